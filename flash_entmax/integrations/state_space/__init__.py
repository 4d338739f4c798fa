"""What each token of a Mamba layer takes from the tokens in front of it: its output as an exact sum over input tokens.

::

    from flash_entmax.integrations import state_space

    parts, bias = state_space.contributions(mixer, hidden)  # parts.sum(2) + bias is mixer(hidden)
    shares = state_space.shares(mixer, hidden)  # (batch, output token, input token), rows that sum to 1

    with inspection.record(model, layers=state_space.recorder()) as calls:  # these layers, beside attention
        model(tokens)

A state-space layer has no attention, but given its gates it is linear in its input tokens. The gates depend on the
input as the probabilities of attention do, and are held fixed as these are: the time steps, what is written to the
state and read from it, the gate of the output, the gain of its norm, and of ``SiLU(a) = sigmoid(a) * a`` behind the
convolution the factor ``sigmoid(a)``. The decomposition is that of LaTIM (arXiv 2502.15612), which approximates this
SiLU. With its gate held fixed, nothing is approximated. docs/state_space.md has the formulas.

Nothing in a model is changed: its weights are read, and no more.
"""

from .measures import MEASURES
from .mixers import ACCEPTED
from .recorded import RecordedMixer, recorder
from .split import Contributions, contributions, shares

__all__ = ["ACCEPTED", "MEASURES", "Contributions", "RecordedMixer", "contributions", "recorder", "shares"]
