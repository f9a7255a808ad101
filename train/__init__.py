"""Training: the programs sft, dpo and aot, and the loop, data, losses and optimizer behind them."""
