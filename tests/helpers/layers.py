"""The rooms of `rpsa`, lowest first: each may import those above it in this list."""

LAYERS = [
    {"errors", "text", "progress"},
    {"sharding", "settings"},
    {"templates", "parameters", "artifacts", "rows", "prompts", "thought", "http"},
    {"provenance"},
    {"fisher"},
    {"freezing", "alternatives"},
    {"chat", "answers", "checkpoints"},
    {"generation"},
    {"reference", "safety_data"},
    {"training"},
    {"tiny"},
    {"recipe"},
    {"models"},
    {"evaluation"},
    {"analysis"},
    {"report"},
    {"pipeline"},
    {"plan"},
    {"cli"},
    {"__main__"},
]
