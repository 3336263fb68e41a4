"""LoRA adapters over ternary weights: training, saving, merging."""
