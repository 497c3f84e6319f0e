"""Reading by threads."""

from senseflow.data.ahead import in_groups, in_order


def test_threads_keep_the_order_and_their_distance():
    asked = []
    results = in_order(lambda n: asked.append(n) or n * n, range(20), 3, ahead=4)
    assert next(results) == 0 and len(asked) <= 5
    assert list(results) == [n * n for n in range(1, 20)]


def test_groups_come_whole():
    groups = [range(4), range(4, 8), range(8, 9), range(9, 40)]
    pairs = in_groups(lambda n: -n, groups, 2)
    assert next(pairs) == (groups[0], [0, -1, -2, -3])
    assert next(pairs) == (groups[1], [-4, -5, -6, -7])
    assert next(pairs) == (groups[2], [-8])
    pairs.close()
    assert list(in_groups(str, [], 2)) == []
