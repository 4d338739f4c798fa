"""The recipe adapt: a pretrained model taken from softmax to entmax. ``plan.py`` opens with what it shows."""
