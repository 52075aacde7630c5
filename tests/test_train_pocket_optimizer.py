"""The optimizer of the pocket trainings: orthogonal updates of matrices, Adam for the rest."""

import copy

import pytest
import recipe
import torch


def gradient(parameter, step):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 36


def updated(parameters, steps=3, adam=False, **options):
    """Copies of the parameters after steps; their gradients are random, the same whenever the sizes are."""
    parameters = [torch.nn.Parameter(p.clone()) for p in parameters]
    optimizer = recipe.Muon([{"params": parameters, "adam": adam}], lr=0.1, **options)
    for step in range(steps):
        for p in parameters:
            p.grad = gradient(p, step)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (3, 2, 2, 2)])
def test_the_update_of_a_matrix_is_orthogonal_and_as_large_as_adams(shape):
    (matrix,) = updated([torch.zeros(shape)], steps=1, weight_decay=0)
    size = max(matrix.flatten(1).shape) ** 0.5
    values = torch.linalg.svdvals(matrix.flatten(1)) / (0.1 * 0.2 * size)
    assert 0.6 < values.min() and values.max() < 1.3  # five iterations come that near to 1


def test_it_points_along_the_gradient():
    matrix = torch.zeros(5, 7)
    u, _, v = torch.linalg.svd(gradient(matrix, 0), full_matrices=False)
    (matrix,) = updated([matrix], steps=1, weight_decay=0)
    assert torch.cosine_similarity(matrix.flatten(), -(u @ v).flatten(), dim=0) > 0.97


def test_matrices_of_one_shape_are_updated_as_they_would_be_alone():
    shapes = [(4, 6), (4, 6), (2, 3, 3, 3), (4, 6), (2, 3, 3, 3), (5,), (7,)]
    parameters = [torch.randn(shape, generator=torch.Generator().manual_seed(i))
                  for i, shape in enumerate(shapes)]
    together = updated(parameters)
    for parameter, result in zip(parameters, together, strict=True):
        assert torch.allclose(updated([parameter])[0], result, atol=1e-6)


@pytest.mark.parametrize("shape, adam", [((5,), False), ((4, 3), True)])
def test_vectors_and_tables_are_updated_as_adam_does(shape, adam):
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    expected = torch.nn.Parameter(copy.deepcopy(start))
    optimizer = torch.optim.Adam([expected], lr=0.1, betas=(0.9, 0.98), eps=1e-8)
    for step in range(3):
        expected.grad = gradient(start, step)
        optimizer.step()
    assert torch.allclose(updated([start], adam=adam)[0], expected, atol=1e-6)
