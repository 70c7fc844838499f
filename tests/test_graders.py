"""The SDK validates graders and tries them."""

import openai
import pytest
from harness import valid


def test_a_multi_grader_is_validated_and_run(client):
    exact = {
        "type": "string_check",
        "name": "exact",
        "operation": "eq",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    }
    close = {
        "type": "text_similarity",
        "name": "close",
        "evaluation_metric": "rouge_l",
        "input": "{{sample.output_text}}",
        "reference": "{{item.answer}}",
    }
    graders = client.fine_tuning.alpha.graders
    for grader in (exact, close):
        assert valid(graders.validate(grader=grader)).grader.to_dict() == grader
    multi = {
        "type": "multi",
        "name": "both",
        "graders": {"exact": exact, "close": close},
        "calculate_output": "0.5 * exact + 0.5 * close",
    }
    run = valid(graders.run(grader=multi, model_sample="the cat sat", item={"answer": "the cat ran"}))
    assert run.sub_rewards == {"close": pytest.approx(2 / 3), "exact": 0}
    assert run.reward == pytest.approx(1 / 3)
    assert (run.metadata.name, run.metadata.type) == ("both", "multi")
    assert not any(value for value in run.metadata.errors.to_dict().values())


def test_a_grader_that_runs_a_client_s_program_is_refused_with_the_reason(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.alpha.graders.validate(grader={"type": "python", "name": "n", "source": "1"})
    assert refused.value.code == "grader_not_available"
    assert "program" in str(refused.value)
