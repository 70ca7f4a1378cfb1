"""Tokens a second of vLLM on this GPU, beside what `rpsa plan` expects of it.

    python benchmarks/serving.py deepseek-ai/DeepSeek-R1-Distill-Llama-8B --count 512 --mean 1000
    python benchmarks/serving.py 8b --dummy                     # a shape of gpu_8b.py, with random weights

The lengths are the plan's own, and every request is generated to its length: what is compared is the arithmetic of
`rpsa.plan.serving`, not how long responses are. The GPU's peaks are those of the kind whose name it has.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rpsa.plan.serving import ResponseSet, expected, server
from rpsa.plan.time import BANDWIDTH_SHARE, GPUS, UTILISATION


def made_up(shape: str) -> str:
    """A folder with the config of a shape, and nothing else: vLLM makes the weights up."""
    from gpu_8b import config_of

    folder = tempfile.mkdtemp(prefix="rpsa-serving-")
    config = config_of(shape)
    config.architectures, config.use_cache = ["LlamaForCausalLM"], True
    config.max_position_embeddings = 131072
    config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--mean", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--dummy", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from vllm import LLM, SamplingParams, TokensPrompt

    name = torch.cuda.get_device_name()
    gpu = next((kind for kind in GPUS if kind.name in name), GPUS[0])
    model = made_up(given.model) if given.dummy else given.model
    config: Any = AutoConfig.from_pretrained(model)
    engine: dict[str, Any] = {
        "max_num_seqs": given.max_num_seqs,
        "max_model_len": given.prompt + given.limit,
    }
    random_weights = {"load_format": "dummy", "skip_tokenizer_init": True} if given.dummy else {}
    llm = LLM(model=model, dtype="bfloat16", enable_prefix_caching=False, **engine, **random_weights)
    asked = ResponseSet(given.count, given.prompt, given.mean, given.limit)
    requests = asked.requests()
    prompts = [TokensPrompt(prompt_token_ids=[n % 1000 + 10] * one.prompt) for n, one in enumerate(requests)]
    sampling = [SamplingParams(max_tokens=one.new, ignore_eos=True, detokenize=False) for one in requests]
    llm.generate(prompts[:8], [SamplingParams(max_tokens=8)] * 8, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    measured = sum(one.new for one in requests) / (time.perf_counter() - started)

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    each = 2 * parameters / (gpu.bf16 * UTILISATION)
    by = server(
        engine, gpu.memory * 2**30, 2 * parameters, token_bytes, gpu.bandwidth * BANDWIDTH_SHARE, each
    )
    planned = expected([asked], by, wave=None).rate
    print(f"{given.model} on {name}: {measured:,.0f} tokens a second, planned as {gpu.name}: {planned:,.0f}")
    print(f"planned / measured: {planned / measured:.2f}")
    if given.json:
        given.json.write_text(json.dumps({"tokens a second": measured, "planned": planned}))


if __name__ == "__main__":
    main()
