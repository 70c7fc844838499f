use super::*;
use serde_json::json;

fn check(operation: &str, input: &str, reference: &str) -> Grader {
    let grader = json!({"type": "string_check", "name": "check", "operation": operation,
                        "input": input, "reference": reference});
    Grader::parse(&grader, "grader").expect("a grader")
}

fn refusal(grader: Value) -> ApiError {
    Grader::parse(&grader, "grader").expect_err("refused")
}

#[test]
fn a_string_check_compares_as_its_operation_says() {
    for (operation, sample, reward) in [
        ("eq", "Paris", 1.0),
        ("eq", "paris", 0.0),
        ("ne", "paris", 1.0),
        ("like", "It is Paris.", 1.0),
        ("like", "It is paris.", 0.0),
        ("ilike", "It is PARIS.", 1.0),
        ("ilike", "It is Rome.", 0.0),
    ] {
        let grade = check(operation, "{{ sample.output_text }}", "{{item.answer}}")
            .grade(sample, &json!({"answer": "Paris"}));
        assert_eq!((grade.reward, grade.error), (reward, None), "{operation} {sample}");
    }
}

#[test]
fn a_template_that_names_nothing_is_an_error_of_the_grade_and_not_a_score() {
    let item = json!({"answer": "x"});
    let grade = check("eq", "{{item.nothing}}", "x").grade("x", &item);
    assert_eq!((grade.reward, grade.error), (0.0, Some(GradeError::UnknownVariable)));
    let grade = check("eq", "{{sample.output_json.a}}", "x").grade("no json", &item);
    assert_eq!(grade.error, Some(GradeError::SampleIsNotJson));
    let grade = check("eq", "{{sample.output_json.a[1]}}", "2").grade(r#"{"a": [1, 2]}"#, &item);
    assert_eq!((grade.reward, grade.error), (1.0, None));
}

#[test]
fn a_multi_grader_weighs_its_graders_by_its_formula() {
    let grader = json!({
        "type": "multi", "name": "both", "calculate_output": "0.75 * exact + close / 4",
        "graders": {
            "exact": {"type": "string_check", "name": "e", "operation": "eq",
                      "input": "{{sample.output_text}}", "reference": "abcd"},
            "close": {"type": "text_similarity", "name": "c", "evaluation_metric": "fuzzy_match",
                      "input": "{{sample.output_text}}", "reference": "abcd"},
        },
    });
    let grader = Grader::parse(&grader, "grader").expect("a grader");
    assert_eq!(grader.kind(), "multi");
    let grade = grader.grade("abcx", &Value::Null);
    assert_eq!(grade.sub_rewards, [("close".to_owned(), 0.75), ("exact".to_owned(), 0.0)].into());
    assert_eq!(grade.reward, 0.1875);
}

#[test]
fn a_formula_without_a_finite_value_is_an_error_of_the_grade() {
    let grader = json!({
        "type": "multi", "name": "m", "calculate_output": "1 / a",
        "graders": {"type": "string_check", "name": "a", "operation": "eq", "input": "x",
                    "reference": "y"},
    });
    let grade = Grader::parse(&grader, "grader").expect("one alone").grade("", &Value::Null);
    assert_eq!((grade.reward, grade.error), (0.0, Some(GradeError::NotFinite)));
}

#[test]
fn what_cannot_be_computed_here_is_refused_with_the_reason() {
    let metric = |metric: &str| {
        json!({"type": "text_similarity", "name": "n", "evaluation_metric": metric,
               "input": "a", "reference": "b"})
    };
    for (grader, param, word) in [
        (json!({"type": "python", "name": "n", "source": "x"}), "grader.type", "program"),
        (json!({"type": "score_model", "name": "n"}), "grader.type", "another model"),
        (json!({"type": "label_model", "name": "n"}), "grader.type", "another model"),
        (metric("cosine"), "grader.evaluation_metric", "embedding"),
        (metric("meteor"), "grader.evaluation_metric", "synonyms"),
    ] {
        let error = refusal(grader);
        assert_eq!(error.code, ErrorCode::GraderNotAvailable);
        assert_eq!(error.param.as_deref(), Some(param));
        assert!(error.message.contains(word), "{error}");
    }
}

#[test]
fn a_mistake_is_named_by_its_path() {
    let a = json!({"type": "string_check", "name": "a", "operation": "eq", "input": "x",
                   "reference": "y"});
    let multi = |output: &str, graders: Value| json!({"type": "multi", "name": "m", "calculate_output": output, "graders": graders});
    for (grader, param) in [
        (json!("x"), "grader"),
        (json!({"name": "n"}), "grader.type"),
        (json!({"type": "poetry", "name": "n"}), "grader.type"),
        (
            json!({"type": "string_check", "name": "n", "operation": "is", "input": "", "reference": ""}),
            "grader.operation",
        ),
        (
            json!({"type": "string_check", "name": "n", "operation": "eq", "input": "{{x}}", "reference": ""}),
            "grader.input",
        ),
        (
            json!({"type": "string_check", "operation": "eq", "input": "", "reference": ""}),
            "grader.name",
        ),
        (multi("a", json!({})), "grader.graders"),
        (multi("a +", json!({"a": a})), "grader.calculate_output"),
        (multi("a + b", json!({"a": a})), "grader.calculate_output"),
        (multi("m", json!({"m": multi("a", json!({"a": a}))})), "grader.graders.m.type"),
    ] {
        assert_eq!(refusal(grader.clone()).param.as_deref(), Some(param), "{grader}");
    }
}
