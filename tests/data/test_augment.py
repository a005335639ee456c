"""Pictures that are changed while a network learns from them."""

import torch

from regrow.data.vision import cut_out, shift_and_flip


def test_a_square_is_cut_out_of_each_picture_by_itself():
    torch.manual_seed(0)
    pictures = torch.rand(400, 3, 12, 12) + 0.1
    cut = cut_out(pictures, 4)
    gone = cut == 0
    assert torch.equal(cut[~gone], pictures[~gone]) and torch.equal(gone[:, 0], gone[:, 1])
    areas = gone[:, 0].flatten(1).sum(1)
    assert areas.max() == 16 and areas.min() >= 4, "a quarter at least is in the picture: its middle is"
    for hole in gone[:, 0]:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns[None, :])
        assert rows.diff().sum() <= 2 and columns.diff().sum() <= 2, "in one piece"
    assert gone[:, 0].any(0).all(), "anywhere"
    assert cut_out(pictures, 0) is pictures


def test_pictures_move_and_nothing_is_made_up():
    torch.manual_seed(0)
    pictures = torch.rand(50, 1, 8, 8) + 0.1
    away = shift_and_flip(pictures)
    for before, after in zip(pictures, away, strict=True):
        there = after[after != 0]
        assert torch.isin(there, before).all() and len(there) >= 16
    assert not torch.equal(away, pictures)
