"""Pictures of recorded calls: that they are there, and that what they show is what was recorded."""

import pytest
import torch
from checks import any_in_tiles

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs, topic_inputs

pytest.importorskip("matplotlib")
from flash_entmax import plot


def pixels(path):
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[0] > 200
    return torch.tensor(image[..., :3])


def figures(calls):
    return {
        "support": plot.support_figure(calls, "Support size"),
        "sparsity": plot.sparsity_figure(calls, "Block sparsity"),
        "map": plot.map_figure(calls[0], "One head", head=1),
        "binned": plot.map_figure(calls[0], "One head", head=1, cells=40),
    }


def test_pictures(tmp_path):
    with inspection.record() as calls:
        for seed in range(3):
            entmax_attention(*topic_inputs(1, 2, 200, 32, 2 + seed, seed=seed), is_causal=True)
    drawn = figures(calls)
    for name, figure in drawn.items():
        colours = pixels(plot.save_figure(figure, tmp_path / "made" / f"{name}.png")).flatten(0, 1).unique(dim=0)
        assert len(colours) > 100, name
    words = {text.get_text() for text in drawn["support"].axes[0].texts}
    assert words == {f"{size:.1f}" for call in calls for size in call.keys_per_query.tolist()}
    lines = drawn["sparsity"].axes[0].lines
    assert [line.get_label() for line in lines] == ["0", "1", "2"]
    expected = 100 * calls[2].block_sparsity_by_position
    assert lines[2].get_ydata().tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("cells", [200, 40])
def test_the_map_is_white_where_nothing_is_attended_to(cells):
    """Coloured where a pair has positive probability, grey where all are hidden, white elsewhere."""
    with inspection.record() as calls:
        entmax_attention(*iid_inputs(1, 1, 150, 16), is_causal=True, window_size=(60, 0))
    image = torch.tensor(plot.map_figure(calls[0], "", cells=cells).axes[0].images[0].get_array())
    square = -(-150 // cells)
    attended = any_in_tiles(calls[0].rows().to_dense() > 0, (square, square))
    i, j = torch.arange(150).unsqueeze(-1), torch.arange(150)
    seen = any_in_tiles((j <= i) & (j >= i - 60), (square, square))
    grey = torch.tensor([0xE3, 0xE5, 0xE8], dtype=torch.float64) / 255
    assert torch.equal(torch.isclose(image, grey).all(-1), ~seen)
    assert torch.equal((image == 1).all(-1), seen & ~attended)
