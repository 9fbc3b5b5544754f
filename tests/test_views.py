"""Views really differ, and each choice stands once at every letter."""

from PIL import Image

from collator import Collator
from vqa.views import make_views


def test_scales_change_the_grid_that_the_model_sees(processor, rows, capsys):
    collate = Collator(processor, 140)
    plain, smaller, larger = make_views(rows, collate, [0.9, 1.0, 1.1])
    assert (plain.name, smaller.name, larger.name) == ("plain", "scale 0.9", "scale 1.1")
    for view in (smaller, larger):
        seen, before = collate(view.changed_rows())["image_grid_thw"], collate([rows[i] for i in view.changed])
        assert (seen != before["image_grid_thw"]).any(1).all()
        assert len(view.changed) == len(rows)
    assert "scale 0.9: another grid for 24 of 24 rows" in capsys.readouterr().out


def test_a_scale_that_changes_no_grid_gives_no_view(processor, rows, tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "smallest.png")  # four tokens, the fewest there are
    smallest = {**rows[0], "image": str(tmp_path / "smallest.png")}
    assert [view.name for view in make_views([smallest], Collator(processor, 140), [0.9, 1.0])] == ["plain"]
    assert "another grid for 0 of 1 rows" in capsys.readouterr().out
    views = make_views([smallest, rows[0]], Collator(processor, 140), [0.9, 1.0])
    assert [view.changed for view in views] == [[0, 1], [1]]


def test_rotations_show_every_choice_at_every_letter(processor, rows):
    views = make_views(rows, Collator(processor, 140), orders=4)
    assert len(views) == 4
    for i in range(len(rows)):
        orders = [view.rows[i].get("order", [0, 1, 2, 3]) for view in views]
        for letter in range(4):
            assert sorted(order[letter] for order in orders) == [0, 1, 2, 3]


def test_a_row_of_two_choices_has_two_rotations(processor, rows):
    short = [{**rows[0], "choices": ["x", "y"]}, rows[1]]
    views = make_views(short, Collator(processor, 140), orders=4)
    assert [view.changed for view in views] == [[0, 1], [0, 1], [1], [1]]
