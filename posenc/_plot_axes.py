"""What the pictures share: axes, lines told apart without colour, maps, labels."""

# SPDX-License-Identifier: BSD-3-Clause

import numpy as np

from . import _tensors as tensors
from ._check import must, real_array

# Width and height of a figure in inches.
CURVES = (8.0, 4.8)
MAP = (6.4, 5.2)

# Colour, dashes and marker of one line after the other: Okabe and Ito's palette, told
# apart with every kind of colour vision; the dashes and markers do without any.
LOOKS = (
    ("#000000", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#0072B2", "-.", "^"),
    ("#009E73", ":", "D"),
    ("#E69F00", (0, (9, 2)), "v"),
    ("#CC79A7", (0, (6, 1.5, 1, 1.5, 1, 1.5)), "P"),
    ("#56B4E9", (0, (3, 1)), "X"),
    ("#B8A200", (0, (1, 3)), "*"),  # their yellow is too light for a line
    ("#7f7f7f", (0, (4, 4)), "p"),
)
BAR = (1.03, 0, 0.04, 1)  # of a map, in shares of its axes: left, bottom, width, height
# Evenly lighter from low to high: a grey print keeps the order.
COLOR_MAP = "cividis"
GREY = "#555555"
TITLE_SIZE = 12
LABEL_SIZE = 10
# Points from the axes to the sample of a line and to its name.
SAMPLE, NAME = 6, 44
LINE_HEIGHT = 1.3  # least distance of two names, in heights of a letter


# --- what is given -------------------------------------------------------------------


def values_of(function, parameter, value, *n_axis):
    """Return numbers in float64, also of a tensor with gradients; check the axes."""
    if tensors.is_tensor(value) and value.requires_grad:
        value = value.detach()
    array = real_array(function, parameter, value)
    if array.ndim not in n_axis or not array.size:
        counts = " or ".join(map(str, n_axis))
        rule = f"be of {counts} dimension{'s'[: counts != '1']} and not be empty"
        got = f"shape {array.shape}"
        raise ValueError(must(function, parameter, rule, got))
    return array


def positions_of(function, parameter, positions, n):
    """Return the positions (n,) of rows or columns, by default counted from 0."""
    if positions is None:
        return np.arange(float(n))
    array = values_of(function, parameter, positions, 1)
    if array.size != n:
        rule = f"have {n} entries, one for each row or column"
        raise ValueError(must(function, parameter, rule, f"{array.size} entries"))
    return array


def axes_or_new(function, axes, size):
    """Return the axes given, or new ones that notebooks and ``show`` display."""
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        rule = "be installed: pip install 'posenc[plot]'"
        raise ImportError(must(function, "matplotlib", rule, error)) from error
    if axes is None:
        from matplotlib import pyplot

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(axes, Axes):
        rule = "be the Axes of a matplotlib figure"
        raise TypeError(must(function, "axes", rule, type(axes).__name__))
    return axes


# --- lines ---------------------------------------------------------------------------


def look(index):
    """Return ``(color, dashes, marker)`` of a line; those of 81 lines differ."""
    n = len(LOOKS)
    _, dashes, marker = LOOKS[(index + index // n) % n]
    return LOOKS[index % n][0], dashes, marker


def set_frame(axes, title, x_label, y_label):
    """Name the axes of curves, and leave out what says nothing."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)


def label_ends(axes, ends):
    """
    Name each curve at the right, as high as it ends, with a sample of its line.

    Parameters
    ----------
    axes : Axes
        With their final limits.
    ends : list of (label, height, color, dashes)
        Names, and where in the units of the axes the curves end.
    """
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    wanted = [float(np.clip(to_axes.transform((x, end[1]))[1], 0, 1)) for end in ends]
    order = sorted(range(len(ends)), key=wanted.__getitem__)
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    step = LINE_HEIGHT * LABEL_SIZE / height
    heights = spread([wanted[i] for i in order], step)
    place = _right_of(axes)
    for i, y in zip(order, heights, strict=True):
        label, _, color, dashes = ends[i]
        axes.annotate(
            label,
            (SAMPLE, y),
            xytext=(NAME, y),
            xycoords=place,
            textcoords=place,
            va="center",
            fontsize=LABEL_SIZE,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linestyle": dashes,
                "linewidth": 1.5,
                "shrinkA": 3,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _right_of(axes):
    """Return coordinates: points from the right edge, share of the height."""
    from matplotlib import transforms

    points = transforms.Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans
    edge = transforms.ScaledTranslation(1, 0, axes.transAxes)
    return transforms.blended_transform_factory(points + edge, axes.transAxes)


def spread(heights, step):
    """
    Move sorted heights as little as needed to be at least a step apart.

    Parameters
    ----------
    heights : list of float
        Where the labels would stand, ascending.
    step : float
        Least distance.

    Returns
    -------
    list of float
        Where they stand, in the same order.

    Examples
    --------
    >>> from posenc._plot_axes import spread
    >>> spread([1.0, 1.0, 5.0], 2.0)
    [0.0, 2.0, 5.0]
    """
    groups = []  # [sum of the places wanted for the lowest label, members]
    for height in heights:
        groups.append([height, 1])
        while len(groups) > 1:
            (low_sum, n_low), (high_sum, n_high) = groups[-2:]
            if low_sum / n_low + step * n_low <= high_sum / n_high:
                break
            groups[-2:] = [[low_sum + high_sum - step * n_low * n_high, n_low + n_high]]
    return [total / n + step * i for total, n in groups for i in range(n)]


# --- maps ----------------------------------------------------------------------------


def draw_map(axes, values, title, unit, *, x, y, square=False):
    """
    Draw a map from dark to light, hatched where a value is not finite.

    Parameters
    ----------
    axes : Axes
        Where it goes.
    values : ndarray, shape (rows, columns)
        What is drawn; the first row is on top.
    title, unit : str
        Of the picture, and of the values.
    x, y : (str, ndarray)
        Label of an axis, and what stands at each column or row.
    square : bool, default False
        Whether cells are to be squares, unless that makes a narrow strip.
    """
    hidden = ~np.isfinite(values)
    if hidden.any():
        axes.patch.set(hatch="////", edgecolor="#bbbbbb", linewidth=0)
    (left, right), (top, bottom) = _span(x[1]), _span(y[1])
    n_least, n_most = sorted(values.shape)
    image = axes.imshow(
        np.ma.array(values, mask=hidden),
        cmap=COLOR_MAP,
        interpolation_stage="data",  # colors between those of the bar say nothing
        aspect="equal" if square and n_most <= 2 * n_least else "auto",
        extent=(left, right, bottom, top),
    )
    _name_cells(axes.xaxis, *x)
    _name_cells(axes.yaxis, *y)
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE)
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, cax=axes.inset_axes(BAR), label=unit)
    bar.outline.set_visible(False)
    if is_whole(values):
        bar.locator = whole_ticks()


def whole_ticks():
    """Return a locator of a few ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1)


def is_whole(values):
    """Tell whether all finite values are whole numbers."""
    finite = values[np.isfinite(values)]
    return bool((finite == np.round(finite)).all())


def _is_even(places):
    """Tell whether places ascend in equal steps."""
    steps = np.diff(places)
    return steps.size == 0 or (steps[0] > 0 and np.allclose(steps, steps[0]))


def _span(places):
    """Return from where to where an axis goes: in its places if they are even."""
    if not _is_even(places):
        return -0.5, len(places) - 0.5
    half = (places[-1] - places[0]) / max(len(places) - 1, 1) / 2 or 0.5
    return places[0] - half, places[-1] + half


def _name_cells(axis, label, places):
    """Label an axis; where its places are uneven, cells are counted and named."""
    from matplotlib.ticker import FuncFormatter

    axis.set_label_text(label)
    axis.set_major_locator(whole_ticks())
    if not _is_even(places):
        last = len(places) - 1
        axis.set_major_formatter(
            FuncFormatter(
                lambda i, _: f"{places[round(i)]:g}" if 0 <= round(i) <= last else ""
            )
        )
