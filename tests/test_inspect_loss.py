"""The losses that flash-entmax inspect shows, with alpha and with softmax; or why it shows none."""

import pytest
import torch
from inspect_command import loss_of, run_command, saved_beside, shown_losses, words_of
from test_inspection import tiny_llama


@pytest.mark.parametrize("logits", [2**28, 64 * 7], ids=["at once", "in pieces"])
def test_losses_are_those_of_the_model(llama_folder, tmp_path, capsys, monkeypatch, logits):
    """With the alpha that is shown and with softmax, in the terminal and on the page; however many at a time."""
    from flash_entmax.programs.inspect import loss

    monkeypatch.setattr(loss, "MOST_LOGITS", logits)
    monkeypatch.setattr(loss, "ROWS", 5)
    options = "--text", llama_folder / "text.txt", "--tokens", 90, "--device", "cpu", "--out", tmp_path
    code, printed, complaints = run_command(capsys, llama_folder, *options, "--attention", "sparsemax")
    assert (code, complaints) == (0, "")
    ids, model = words_of(llama_folder, 0, 90), tiny_llama()
    expected = loss_of(model, "sparsemax", ids), loss_of(model, "sdpa", ids)
    assert abs(expected[0] - expected[1]) > 0.01
    assert shown_losses(printed) == pytest.approx(expected, abs=0.0006)
    line = next(line for line in printed.splitlines() if line.startswith("loss"))
    assert line.startswith("loss in nats per token: ")
    assert "with alpha 2, " in line
    assert line in (tmp_path / "attention.html").read_text()
    assert sum("layers." in row for row in printed.splitlines()) == 2


def test_a_model_whose_softmax_is_eager(llama_folder, tmp_path, capsys):
    """Gemma 2 caps its scores, which PyTorch's attention does not: the loss with softmax has the cap as well."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=1, attn_logit_softcapping=2.0, initializer_range=0.5,
        final_logit_softcapping=3.0, sliding_window=16,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    saved_beside(llama_folder, tmp_path, model)
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, complaints) == (0, "")
    ids = words_of(llama_folder, 0, 40)
    expected = loss_of(model, "entmax15", ids), loss_of(model, "eager", ids)
    assert shown_losses(printed) == pytest.approx(expected, abs=0.0006)


def without_a_head():
    return tiny_llama().model


def that_fills_gaps():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=64, attention_probs_dropout_prob=0.0, **sizes))


def that_sees_ahead():
    model = tiny_llama()
    model.config.is_causal = False
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (without_a_head, "LlamaModel has no head that predicts the next token"),
        (that_fills_gaps, "BertForMaskedLM predicts hidden tokens, not the next one"),
        (that_sees_ahead, "the tokens of this LlamaForCausalLM see those that follow them"),
    ],
)
def test_why_no_loss_is_shown(llama_folder, tmp_path, capsys, make, words):
    pytest.importorskip("matplotlib")
    saved_beside(llama_folder, tmp_path, make())
    options = "--text", llama_folder / "text.txt", "--tokens", 40, "--device", "cpu", "--out", tmp_path / "out"
    code, printed, complaints = run_command(capsys, tmp_path, *options)
    assert (code, complaints) == (0, "")
    assert f"\nno loss is shown: {words}\n" in printed
    assert f"no loss is shown: {words}" in (tmp_path / "out" / "attention.html").read_text()
