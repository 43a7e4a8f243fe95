"""Cases small enough to score by eye, and equality with the libraries where a metric wraps one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_medical.evaluation.metric import Answers
from moe_medical.evaluation.metrics import ALL_METRICS, METRICS, VARIANTS, all_scores, left_out, score
from moe_medical.evaluation.readings import normalise
from moe_medical.evaluation.text_metrics import HAS_JIEBA

LABELS = ["a", "b", "c"]
label_rows = st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Acute  Bronchitis. ", "acute bronchitis"),
        ("acute-bronchitis", "acute bronchitis"),
        ("Crohn's disease", "crohns disease"),
        ("Dose: 1.5 mg/day!", "dose 1.5 mg day"),
        ("E11.9", "e11.9"),
        ("-3", "-3"),
        ("COVID-19", "covid 19"),
        ("HER2+", "her2+"),
        ("高血压 、 2 级。", "高血压2级"),
        ("ＩＣＤ", "icd"),
        ("...", "..."),
        ("", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@given(st.text(alphabet="aB1 -.,'高、", max_size=12))
def test_normalise_is_idempotent(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


NAMES = sorted(name for name in ALL_METRICS if HAS_JIEBA or not name.endswith("_jieba"))


@pytest.mark.parametrize("metric", NAMES)
def test_every_metric_gives_one_to_a_perfect_prediction(metric: str) -> None:
    numbers, entities = ["1", "2", "3"], ["drug: a; b", "none"]
    own = {"spearman": numbers, "pearson": numbers, "entity_f1": entities}
    report = ["报告如下：\n主诉：咳嗽三天\n诊断：感冒"]
    own |= dict.fromkeys(("rouge_l_sections", "rouge_l_sections_jieba"), report)
    words = ["yes it is so", "acute viral hepatitis B", "no it is not"]
    rows = own.get(metric, words if metric == "bleu4" else ["yes", "acute viral hepatitis", "no"])
    assert score(metric, rows, rows) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", NAMES)
def test_no_metric_rewards_silence(metric: str) -> None:
    targets = ["yes", "no"] if metric == "f1_yes" else ["yes: 1", "yes: 2"]
    assert score(metric, ["", ""], targets) == 0.0


def test_variants_are_metrics() -> None:
    assert set(VARIANTS) <= set(METRICS)
    assert {name for names in VARIANTS.values() for name in names} <= set(ALL_METRICS)


def test_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"metric must be one of exact_match, .*sections_jieba, got 'bleurt'"
    ):
        score("bleurt", ["a"], ["a"])


@pytest.mark.parametrize(("predictions", "targets"), [([], []), (["a"], ["a", "b"])])
def test_no_rows_and_unequal_lengths_are_refused(predictions: list[str], targets: list[str]) -> None:
    with pytest.raises(ValueError, match="one prediction per target"):
        score("exact_match", predictions, targets)


def test_exact_match_is_the_share_of_equal_rows() -> None:
    assert score("exact_match", ["Fever!", "cough", "1.5", "15"], ["fever", "pain", "1.5", "1.5"]) == 0.5


@pytest.mark.parametrize(
    "prediction",
    ["B", "b", "B.", "B)", "(B)", " (b) ", "B. Aspirin", "B: aspirin", "**B**", "The answer is B",
     "Answer: B.", "the answer is (B) aspirin", "Option B is right", "答案是B", "选B", "B\nbecause of A",
     "Ｂ"],
)  # fmt: skip
def test_accuracy_finds_the_letter(prediction: str) -> None:
    assert score("accuracy", [prediction], ["B"]) == 1.0


@pytest.mark.parametrize(
    "prediction", ["A patient with fever", "The answer is a drug", "Aspirin", "AB", "B", "", "no answer: An"]
)
def test_accuracy_takes_no_article_or_word_for_the_letter_a(prediction: str) -> None:
    assert score("accuracy", [prediction], ["A"]) == 0.0


def test_accuracy_reads_the_first_line_of_a_label() -> None:
    predictions = ["\nBenign.\nIt is small.", "malignant", "benign tumour"]
    assert score("accuracy", predictions, ["benign", "Malignant", "benign"]) == pytest.approx(2 / 3)


def test_macro_f1_by_hand() -> None:
    # a: TP 1 FP 1 FN 1 -> 1/2; b: TP 1 FP 1 FN 1 -> 1/2
    assert score("macro_f1", ["aa", "bb", "aa", "bb"], ["aa", "bb", "bb", "aa"]) == 0.5


def test_an_unknown_label_is_wrong_but_no_class_of_the_macro_mean() -> None:
    # aa: TP 1, FN 1 -> 2/3; bb: TP 1 -> 1; the mean is over these two
    predictions, targets = ["aa", "zz", "bb"], ["aa", "aa", "bb"]
    assert score("macro_f1", predictions, targets) == pytest.approx((2 / 3 + 1) / 2)
    assert score("micro_f1", predictions, targets) == pytest.approx(2 / 3)


@settings(deadline=None)  # the first example imports the library
@given(label_rows)
def test_label_f1_equals_sklearn(rows: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    predictions, targets = [p for p, _ in rows], [t for _, t in rows]
    known = sorted(set(targets))
    expected = f1_score(targets, predictions, labels=known, average="macro", zero_division=0.0)
    assert score("macro_f1", predictions, targets) == pytest.approx(expected)
    for name, average in (("macro_f1_union", "macro"), ("micro_f1", "micro"), ("weighted_f1", "weighted")):
        expected = f1_score(targets, predictions, average=average, zero_division=0.0)
        assert score(name, predictions, targets) == pytest.approx(expected)


def test_f1_yes_by_hand() -> None:
    # TP 1, FP 1, FN 1
    assert score("f1_yes", ["Yes.", "yes", "no", "no"], ["yes", "no", "yes", "no"]) == 0.5
    assert score("f1_yes", ["是", "否", "是。"], ["是", "否", "否"], "zh") == pytest.approx(2 / 3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["yes", "no"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_f1_yes_equals_sklearn(rows: list[tuple[str, str]]) -> None:
    from sklearn.metrics import f1_score

    predictions, targets = [p for p, _ in rows], [t for _, t in rows]
    expected = f1_score(targets, predictions, labels=["yes"], average="macro", zero_division=1.0)
    assert score("f1_yes", predictions, targets) == pytest.approx(expected)


def test_set_f1_by_hand() -> None:
    # TP fever, cough; FP pain; FN rash
    assert score("set_f1", ["Fever; cough; fever", "pain"], ["cough;fever", "rash"]) == pytest.approx(4 / 6)
    assert score("set_f1", ["发热\uff1b咳嗽"], ["咳嗽;发热"], "zh") == 1.0


def test_zero_true_positives_are_zero_not_an_error() -> None:
    assert score("set_f1", ["a"], ["b"]) == 0.0
    assert score("entity_f1", ["drug: a"], ["none"]) == 0.0
    assert score("f1_yes", ["no"], ["yes"]) == 0.0


def test_entity_f1_by_hand() -> None:
    prediction = "disease: asthma; COPD\ndrug: asthma\nno idea"
    target = "Disease: copd; asthma\ndrug: salbutamol"
    # TP 2; FP (drug, asthma) and the line without a type; FN (drug, salbutamol)
    assert score("entity_f1", [prediction], [target]) == pytest.approx(4 / 7)


SPANS = [("disease", "old asthma"), ("drug", "aspirin"), ("drug", "insulin"), ("gene", "tp53")]
span_rows = st.tuples(st.sets(st.sampled_from(SPANS)), st.sets(st.sampled_from(SPANS)))


@settings(deadline=None)
@given(st.lists(span_rows, min_size=1, max_size=5))
def test_entity_f1_equals_seqeval(rows: list[tuple[set[tuple[str, str]], set[tuple[str, str]]]]) -> None:
    """Each row as a text with all spans one behind the other, tagged in BIO."""
    from seqeval.metrics import f1_score

    def tags(found: set[tuple[str, str]]) -> list[str]:
        words = [(span, i) for span in SPANS for i, _ in enumerate(span[1].split())]
        return [f"{'I' if i else 'B'}-{span[0]}" if span in found else "O" for span, i in words]

    def lines(found: set[tuple[str, str]]) -> str:
        return "\n".join(f"{kind}: {mention}" for kind, mention in sorted(found)) or "none"

    predictions, targets = [lines(p) for p, _ in rows], [lines(t) for _, t in rows]
    expected = f1_score([tags(t) for _, t in rows], [tags(p) for p, _ in rows], zero_division=1)
    assert score("entity_f1", predictions, targets) == pytest.approx(expected)


def test_entities_may_be_none() -> None:
    assert score("entity_f1", ["None.", "none"], ["none", "drug: none"]) == 1.0
    assert score("entity_f1", ["无"], ["无"], "zh") == 1.0
    assert score("entity_f1", ["疾病\uff1a肺炎"], ["疾病: 肺炎"], "zh") == 1.0


def test_token_f1_by_hand() -> None:
    # 2 of 3 tokens are in 2 of 2; "the" does not count
    assert score("token_f1", ["the viral acute hepatitis"], ["Acute hepatitis"]) == pytest.approx(4 / 5)
    assert score("token_f1", ["急性肝炎"], ["肝炎"], "zh") == pytest.approx(4 / 6)
    assert score("token_f1", ["急性肝炎"], ["肝炎"], "en") == 0.0


def test_rouge_l_by_hand() -> None:
    # longest common subsequence "a c": precision 2/3, recall 2/2
    assert score("rouge_l", ["a b c"], ["a c"]) == pytest.approx(0.8)
    assert score("rouge_l_char", ["急性 肝炎"], ["急肝"], "zh") == pytest.approx(2 / 3)


def test_rouge_l_equals_the_library() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    prediction, target = "no acute fracture is seen", "there is no fracture seen"
    expected = RougeScorer(["rougeL"]).score(target, prediction)["rougeL"].fmeasure
    assert score("rouge_l", [prediction, target], [target, target]) == pytest.approx((expected + 1) / 2)


def test_words_of_bleu_equal_sacrebleu() -> None:
    import sacrebleu

    predictions, targets = (
        ["no acute fracture is seen.", "a b c d"],
        ["an acute fracture is seen.", "a b c e"],
    )
    expected = sacrebleu.corpus_bleu(predictions, [targets]).score / 100
    assert 0 < score("bleu4", predictions, targets) == pytest.approx(expected)


def test_open_questions_as_llava_med_scores_them() -> None:
    # "no" thrice, "lung" once; of the target's words "left" is missing
    prediction, target = "no no no lung", "no left lung"
    assert score("token_recall_llava", [prediction], [target]) == pytest.approx(4 / 5)
    assert score("exact_match_llava", [prediction], [target]) == pytest.approx(2 / 4)
    # counted once each
    assert score("token_recall", [prediction], [target]) == pytest.approx(2 / 3)
    assert score("token_precision", [prediction], [target]) == pytest.approx(2 / 4)
    assert score("exact_match", [prediction], [target]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "target", "found"),
    [
        ("The lung is normal", "no", False),
        ("No, it is not.", "no", True),
        ("the left lung", "left lung", True),
        ("the lung, left", "left lung", False),
        ("", "no", False),
    ],
)
def test_closed_answers_are_found_as_whole_words(prediction: str, target: str, found: bool) -> None:
    assert score("contains_answer", [prediction], [target]) == found


def test_all_scores_tell_the_variants_that_apply() -> None:
    labels = all_scores("micro_f1", Answers(["a1", "b1", "b1", "b1"], ["a1", "a1", "b1", "c1"]), 0)
    # a1: 2/3, b1: 1/2, c1: 0; targets 2, 1, 1
    assert labels.all == {
        "micro_f1": 0.5,
        "weighted_f1": pytest.approx((2 * 2 / 3 + 1 / 2) / 4),
        "macro_f1": pytest.approx((2 / 3 + 1 / 2) / 3),
    }
    assert (labels.score, labels.low, labels.high) == (0.5, None, None)
    letters = all_scores("accuracy", Answers(["A"], ["A"]), 10)
    assert set(letters.all) == {"accuracy", "macro_f1"}
    assert (letters.low, letters.high) == (1.0, 1.0)
    plain = all_scores("rouge_l_char", Answers(["咳嗽"], ["咳嗽三天"], "zh"), 0)
    assert "rouge_l_sections" not in plain.all
    report = all_scores("rouge_l_char", Answers(["如下：\n诊断：感冒"], ["如下：\n诊断：感冒"], "zh"), 0)
    assert report.all["rouge_l_sections"] == 1.0


def test_what_is_left_out_without_jieba_is_told() -> None:
    names = ["rouge_l_jieba", "rouge_l_sections_jieba"]
    assert left_out(["rouge_l_char", "accuracy"]) == ([] if HAS_JIEBA else names)


@pytest.mark.skipif(not HAS_JIEBA, reason="jieba is no dependency")
def test_rouge_of_jieba_words_is_that_of_words_between_spaces() -> None:
    import jieba

    prediction, target = "患者咳嗽三天", "患者反复咳嗽五天"
    spaced = [" ".join(jieba.lcut(text)) for text in (prediction, target)]
    expected = score("rouge_l", [spaced[0]], [spaced[1]])
    assert 0 < expected < 1
    assert score("rouge_l_jieba", [prediction], [target], "zh") == pytest.approx(expected)


def test_bleu_equals_sacrebleu() -> None:
    import sacrebleu

    predictions, targets = ["患者急性肝炎三天", "无明显异常所见"], ["患者急性肝炎两天", "未见明显异常"]
    for language, tokenizer in (("zh", "zh"), ("en", "char")):
        expected = sacrebleu.corpus_bleu(predictions, [targets], tokenize=tokenizer).score / 100
        assert 0 < score("bleu4_char", predictions, targets, language) == pytest.approx(expected)


def test_correlations_read_numbers() -> None:
    targets = ["1", "2", "3", "4"]
    assert score("spearman", ["score: 1.5", "20", "300", "4e3"], targets) == pytest.approx(1.0)
    assert score("pearson", ["-2", "-4 of 5", "-6", "-8"], targets) == pytest.approx(-1.0)


@settings(deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=3, max_size=10, unique=True))
def test_correlations_equal_scipy(numbers: list[int]) -> None:
    from scipy.stats import pearsonr, spearmanr

    targets = list(range(len(numbers)))
    texts, references = [str(n) for n in numbers], [str(t) for t in targets]
    assert score("pearson", texts, references) == pytest.approx(pearsonr(numbers, targets)[0])
    assert score("spearman", texts, references) == pytest.approx(spearmanr(numbers, targets)[0])


def test_a_prediction_without_a_number_pulls_pearson_towards_zero() -> None:
    full = score("pearson", ["1", "3", "2"], ["1", "2", "3"])
    silent = score("pearson", ["1", "3", "2", "no idea", "1e999"], ["1", "2", "3", "9", "0"])
    assert 0 < silent < full


@pytest.mark.parametrize("predictions", [["2", "2", "2"], ["", "", "7"], ["0.1", "0.1", "x"]])
def test_a_constant_prediction_correlates_with_nothing(predictions: list[str]) -> None:
    assert score("pearson", predictions, ["1", "2", "4"]) == 0.0


def test_a_target_without_a_number_is_an_error_that_keeps_its_text_to_itself() -> None:
    with pytest.raises(ValueError, match="target 1 has none") as error:
        score("pearson", ["1", "2"], ["1", "patient"])
    assert "patient" not in str(error.value)
