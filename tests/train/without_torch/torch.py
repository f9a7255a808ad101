"""Training needs no PyTorch. tensorboardX imports it wherever it is installed, which takes two seconds per start."""

raise ImportError("Programs of training start without PyTorch.")
