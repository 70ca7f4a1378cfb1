# rpsa for one machine with NVIDIA GPUs, with the versions that are tested every day:
#     docker build --tag rpsa-image .
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# gcc and python3-dev: Triton compiles; bubblewrap: the sandbox for code that models write
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-venv python3-dev gcc bubblewrap \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/rpsa
ENV PATH=/opt/rpsa/bin:$PATH

WORKDIR /opt/rpsa/source
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY examples examples
RUN pip install --no-cache-dir -c constraints.txt ".[lm-eval]"

WORKDIR /study
CMD ["rpsa", "--help"]
