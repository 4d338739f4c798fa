"""Pictures of recorded calls: that they are there, and that what they show is what was recorded."""

import pytest
import torch
from checks import any_in_tiles

from flash_entmax import entmax_attention, inspection
from flash_entmax.testing import iid_inputs, topic_inputs

pytest.importorskip("matplotlib")
from flash_entmax.show import plot


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
        colours = pixels(plot.save_figure(figure, f"{tmp_path}/made/{name}.png")).flatten(0, 1).unique(dim=0)
        assert len(colours) > 100, name
    words = {text.get_text() for text in drawn["support"].axes[0].texts}
    assert words == {f"{size:.1f}" for call in calls for size in call.keys_per_query.tolist()}


@pytest.mark.parametrize("layers", [1, 2, 30])
def test_block_sparsity_is_a_map_of_layers_by_position(layers):
    """A row for each layer and a column for each tile of queries, both axes and the bar in words; of unlike lengths."""
    with inspection.record() as calls:
        for seed in range(layers):
            entmax_attention(*topic_inputs(1, 2, 200 - 60 * (seed % 2), 32, 2, seed=seed), is_causal=True)
    figure = plot.sparsity_figure(calls, "Block sparsity")
    axes, bar = figure.axes
    shown = torch.tensor(axes.images[0].get_array().filled(torch.nan))
    assert shown.shape == (layers, 4)
    for call, row in zip(calls, shown, strict=True):
        expected = 100 * call.block_sparsity_by_position
        torch.testing.assert_close(row[: len(expected)], expected)
        assert row[len(expected) :].isnan().all()
    assert axes.images[0].get_extent() == [0, 256, layers - 0.5, -0.5]
    assert axes.get_xlim() == (0, 200)
    assert axes.images[0].get_clim() == (0, 100)
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(call.number) for call in calls]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("position of the query (token)", "layer")
    assert bar.get_ylabel() == "empty tiles, %"


def test_titles_fit_and_words_do_not_overlap():
    """However long the title and however few layers: everything is inside the picture."""
    with inspection.record() as calls:
        entmax_attention(*topic_inputs(1, 2, 200, 32, 2), is_causal=True)
    title = "Support size: a model with a name, 1,024 tokens of a-file-with-a-long-name.md from token 4,096 on"
    for draw in (plot.support_figure, plot.sparsity_figure, plot.map_figure):
        figure = draw(calls[0] if draw is plot.map_figure else calls, title)
        figure.draw_without_rendering()
        words = [*figure.texts, *(axes.yaxis.label for axes in figure.axes)]
        for text in words:
            box = text.get_window_extent()
            assert box.x0 >= 0, text
            assert box.y0 >= 0, text
            assert box.x1 <= figure.bbox.x1, text
            assert box.y1 <= figure.bbox.y1, text
        assert not any(figure.texts[0].get_window_extent().overlaps(text.get_window_extent()) for text in words[1:])


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


def test_a_picture_has_one_of_three_formats(tmp_path):
    with pytest.raises(ValueError, match=r"path must end in \.png, \.pdf, \.svg, got .*picture$"):
        plot.save_figure(None, tmp_path / "picture")


def test_what_cannot_be_pictured_is_refused():
    with pytest.raises(ValueError, match="no call with a head to picture"):
        plot.sparsity_figure([], "")
    with pytest.raises(TypeError, match="calls must be a list of recorded calls, got int 3"):
        plot.support_figure(3, "")
    with pytest.raises(ValueError, match="cells must be an integer of at least 1, got int 0"):
        plot.map_figure(None, "", cells=0)
