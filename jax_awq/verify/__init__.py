"""What rounding activations costs: errors of every linear, and perplexity, scheme by scheme."""
