"""Decoder steps as one operator: stacked LSTM cells, attention and attentional vector."""
