"""NLVR2, retrieval after re-ranking and visual dialogue, worked out by hand and by brute force."""

import pytest
import torch

from shared.metrics import dialogue_ranking, nlvr2, nlvr2_statement, rerank, reranked_hits, retrieval_hits


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# NLVR2


def test_a_statement_is_right_only_if_it_is_right_on_all_its_pictures():
    names = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0"]
    found = nlvr2([True, False, True, False], [True, True, True, False], [nlvr2_statement(name) for name in names])
    # one example of four is wrong; of the statements 1-0, 1-1 and 2-0 the first is spoilt by it
    assert found == pytest.approx({"nlvr2/acc@example": 3 / 4, "nlvr2/consistency@statement": 2 / 3})


def test_the_statement_of_an_identifier_forgets_the_pair_alone():
    assert nlvr2_statement("dev-850-0-1") == nlvr2_statement("dev-850-3-1") == "dev-850-1"
    assert len({nlvr2_statement(name) for name in ("dev-1-0-0", "dev-1-0-1", "test1-1-0-0", "dev-11-0-0")}) == 4
    with pytest.raises(ValueError, match="'dev-850', expected split-set-pair-sentence"):
        nlvr2_statement("dev-850")


def test_examples_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="2 predictions, 1 labels, 1 statements"):
        nlvr2([True, False], [True], ["a"])
    with pytest.raises(ValueError, match="no examples to score"):
        nlvr2([], [], [])


# re-ranking

ITC = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.3, 0.8]])
ITM = torch.tensor([[-1.0, 2.0, 9.0], [4.0, 0.25, 0.5]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("itm", [[-1.0, 2.0, -100.0], [-100.0, 0.25, 0.5]]),
        ("itm+itc", [[-1.0 + 0.9, 2.0 + 0.5, -100.0], [-100.0, 0.25 + 0.3, 0.5 + 0.8]]),
    ],
)
def test_only_the_k_best_are_scored_anew(rule, expected):
    torch.testing.assert_close(rerank(ITC, lambda q, c: ITM[q, c], 2, rule), torch.tensor(expected))


def test_candidates_come_best_first_one_query_at_a_time_and_k_may_exceed_them():
    asked = []
    scores = rerank(ITC, lambda q, c: (asked.append((q.tolist(), c.tolist())), ITM[q, c])[1], 7, "itm")
    assert asked == [([0, 0, 0], [0, 1, 2]), ([1, 1, 1], [2, 1, 0])]
    assert torch.equal(scores, ITM)


def test_hits_after_re_ranking_are_taken_direction_by_direction():
    owner = torch.tensor([0, 0, 1, 2, 2])  # picture of each text
    itc, itm = noise(3, 5), noise(3, 5, seed=1)
    i2t = rerank(itc, lambda q, c: itm[q, c], 3, "itm+itc")
    t2i = rerank(itc.T, lambda q, c: itm.T[q, c], 2, "itm+itc")
    found = reranked_hits(i2t, t2i, owner, ks=(1, 2), protocol="itm+itc-k3-2")
    for k in (1, 2):
        by_picture = [any(int(owner[t]) == i for t in best(i2t[i], k)) for i in range(3)]
        by_text = [int(owner[t]) in best(t2i[t], k) for t in range(5)]
        assert found[f"retrieval/i2t_r{k}@itm+itc-k3-2"] == pytest.approx(sum(by_picture) / 3)
        assert found[f"retrieval/t2i_r{k}@itm+itc-k3-2"] == pytest.approx(sum(by_text) / 5)


def best(row, k):
    return row.topk(k).indices.tolist()


def test_re_ranking_all_by_one_matrix_is_ranking_by_it():
    owner, itm = torch.tensor([0, 1, 2, 2]), noise(3, 4, seed=2)
    i2t = rerank(noise(3, 4), lambda q, c: itm[q, c], 4, "itm")
    t2i = rerank(noise(4, 3), lambda q, c: itm.T[q, c], 3, "itm")
    assert reranked_hits(i2t, t2i, owner, protocol="p") == retrieval_hits(itm, owner, protocol="p")


def test_a_right_answer_outside_the_k_best_ranks_behind_all_others():
    itc = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9], [0.9, 0.1, 0.2]])
    scores = rerank(itc, lambda q, c: torch.ones(len(q)), 1, "itm")
    hits = reranked_hits(scores, scores.T, torch.tensor([2, 1, 0]), ks=(1, 2), protocol="itm-k1")
    # the third picture's text is its best; the other two tie with one more that was never scored, which counts as ahead
    assert hits["retrieval/i2t_r1@itm-k1"] == hits["retrieval/i2t_r2@itm-k1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("itc", "k", "rule", "logits", "problem"),
    [
        (ITC, 2, "sum", 0.0, "rule is 'sum', use one of itm, itm"),
        (ITC, 0, "itm", 0.0, "k is 0"),
        (ITC[0], 1, "itm", 0.0, r"shape \(3,\)"),
        (ITC[:, :0], 1, "itm", 0.0, r"shape \(2, 0\)"),
        (ITC * torch.inf, 1, "itm", 0.0, "6 of the similarities are not finite"),
        (ITC, 1, "itm", -100.0, "itm gave -100.0, at or below the -100 of candidates never scored"),
    ],
)
def test_what_cannot_be_re_ranked_is_named(itc, k, rule, logits, problem):
    with pytest.raises(ValueError, match=problem):
        rerank(itc, lambda q, c: torch.full((len(q),), logits), k, rule)


def test_logits_of_another_shape_and_scores_of_another_set_are_refused():
    with pytest.raises(ValueError, match=r"itm gave shape \(2, 2\) for 2 pairs"):
        rerank(ITC, lambda q, c: torch.ones(2, 2), 2, "itm")
    with pytest.raises(ValueError, match=r"i2t has shape \(2, 3\), t2i \(2, 3\)"):
        reranked_hits(ITC, ITC, torch.tensor([0, 1, 1]))


def test_a_matching_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="itm gave nan"):
        rerank(ITC, lambda q, c: torch.full((len(q),), torch.nan), 1, "itm")


# visual dialogue


def test_the_rank_of_the_answer_gives_every_number_of_a_dialogue():
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 1.0, 0.0]])
    found = dialogue_ranking(scores, torch.tensor([0, 2, 1]), ks=(1, 2))  # ranks 1, 3, and 2 for the tie
    expected = {"mrr": (1 + 1 / 3 + 1 / 2) / 3, "mean_rank": 2.0, "r1": 1 / 3, "r2": 2 / 3}
    assert found == pytest.approx({f"visdial/{name}@rank-pessimistic": value for name, value in expected.items()})
