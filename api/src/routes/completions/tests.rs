use crate::testing::{BASE, FakeSampler, Reply, TestApi, announce_sampler, words_of};
use insta::assert_json_snapshot;
use reqwest::Method;
use serde_json::{Value, json};
use std::time::Duration;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::sampling::EndReason;
use tunesmith_core::serving::SampleLine;
use tunesmith_core::weights::{CheckpointPlace, WeightsPlace};

const CHAT: &str = "/v1/chat/completions";
const PLAIN: &str = "/v1/completions";

/// An API with a base model, and a sampler beside it.
async fn world() -> (TestApi, FakeSampler) {
    let api = TestApi::start().await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    (api, sampler)
}

/// A question, with these fields beside it.
fn asked(change: &Value) -> Value {
    let mut body = json!({"model": BASE, "messages": [{"role": "user", "content": "question"}]});
    for (name, value) in change.as_object().expect("object") {
        body[name] = value.clone();
    }
    body
}

/// The data of each event of a stream; the last one must be its end.
fn events(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let text = String::from_utf8(reply.body.clone()).expect("text");
    let mut events: Vec<&str> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    assert_eq!(events.pop(), Some("data: [DONE]"), "{text}");
    let data = events.iter().filter_map(|event| event.strip_prefix("data: "));
    data.map(|event| serde_json::from_str(event).expect("JSON")).collect()
}

#[tokio::test]
async fn a_chat_completion_is_shown_as_the_sdks_declare_it() {
    let (api, sampler) = world().await;
    sampler.will_say(&["answer", "question"], EndReason::Stop);
    let body = asked(&json!({"temperature": 0, "seed": -1, "max_completion_tokens": 9,
                             "logit_bias": {"5": -100}, "logprobs": true, "top_logprobs": 2}));
    let reply = api.post(CHAT, &body).await;
    assert!(reply.header("x-request-id").is_some());
    assert_json_snapshot!(reply.ok(), {".id" => "[id]", ".created" => "[time]"}, @r#"
    {
      "id": "[id]",
      "object": "chat.completion",
      "created": "[time]",
      "model": "tiny",
      "choices": [
        {
          "index": 0,
          "message": {
            "role": "assistant",
            "content": "answer question",
            "refusal": null
          },
          "logprobs": {
            "content": [
              {
                "token": "answer",
                "logprob": -0.5,
                "bytes": [
                  97,
                  110,
                  115,
                  119,
                  101,
                  114
                ],
                "top_logprobs": [
                  {
                    "token": "answer",
                    "logprob": -0.5,
                    "bytes": [
                      97,
                      110,
                      115,
                      119,
                      101,
                      114
                    ]
                  },
                  {
                    "token": "user",
                    "logprob": -1.5,
                    "bytes": [
                      117,
                      115,
                      101,
                      114
                    ]
                  }
                ]
              },
              {
                "token": "question",
                "logprob": -0.5,
                "bytes": [
                  113,
                  117,
                  101,
                  115,
                  116,
                  105,
                  111,
                  110
                ],
                "top_logprobs": [
                  {
                    "token": "question",
                    "logprob": -0.5,
                    "bytes": [
                      113,
                      117,
                      101,
                      115,
                      116,
                      105,
                      111,
                      110
                    ]
                  },
                  {
                    "token": "user",
                    "logprob": -1.5,
                    "bytes": [
                      117,
                      115,
                      101,
                      114
                    ]
                  }
                ]
              }
            ],
            "refusal": null
          },
          "finish_reason": "stop"
        }
      ],
      "usage": {
        "prompt_tokens": 6,
        "completion_tokens": 2,
        "total_tokens": 8,
        "prompt_tokens_details": {
          "cached_tokens": 2
        }
      }
    }
    "#);
    let order = sampler.last_order();
    // The template's words and the prompt's: <|im_start|> user question <|im_end|> <|im_start|>
    // assistant.
    assert_eq!(order.prompt, [1, 3, 5, 2, 1, 4]);
    assert_eq!((order.tuned, order.n, order.low_priority), (None, 1, false));
    let sampling = order.sampling;
    assert_eq!((sampling.max_tokens, sampling.temperature, sampling.seed), (9, 0.0, u64::MAX));
    assert_eq!((sampling.stop_ids, sampling.logit_bias), (vec![2], vec![(5, -100.0)]));
    assert_eq!(sampling.top_logprobs, 2);
}

#[tokio::test]
async fn a_streams_chunks_are_the_whole_answer() {
    let (api, sampler) = world().await;
    for stream in [false, true] {
        let mut lines = words_of(0, &["answer", "question"]);
        lines.extend(words_of(1, &["user"]));
        lines.push(SampleLine::Waiting);
        lines.push(SampleLine::End { index: 1, reason: EndReason::Length, cached_tokens: 0 });
        lines.extend(words_of(0, &["answer"]));
        lines.push(SampleLine::End { index: 0, reason: EndReason::Stop, cached_tokens: 0 });
        sampler.will_send(lines);
        let mut body = asked(&json!({"n": 2, "stream": stream}));
        if stream {
            body["stream_options"] = json!({"include_usage": true});
        }
        let reply = api.post(CHAT, &body).await;
        if !stream {
            let whole = reply.ok();
            assert_eq!(whole["choices"][0]["message"]["content"], "answer question answer");
            assert_eq!(whole["choices"][1]["message"]["content"], "user");
            assert_eq!(whole["choices"][1]["finish_reason"], "length");
            assert_eq!(whole["usage"]["completion_tokens"], 4);
            continue;
        }
        let chunks = events(&reply);
        let (mut texts, mut reasons) = ([String::new(), String::new()], [Value::Null, Value::Null]);
        for chunk in &chunks[..chunks.len() - 1] {
            assert_eq!(
                (&chunk["object"], &chunk["id"]),
                (&json!("chat.completion.chunk"), &chunks[0]["id"])
            );
            assert_eq!(chunk["usage"], Value::Null);
            let choice = &chunk["choices"][0];
            let index = choice["index"].as_u64().expect("index") as usize;
            texts[index] += choice["delta"]["content"].as_str().unwrap_or_default();
            if !choice["finish_reason"].is_null() {
                reasons[index] = choice["finish_reason"].clone();
            }
        }
        assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
        assert_eq!(texts, ["answer question answer", "user"]);
        assert_eq!(reasons, [json!("stop"), json!("length")]);
        let last = chunks.last().expect("usage");
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"]["total_tokens"], 10);
    }
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_gives_up_on_the_rest() {
    let (api, sampler) = world().await;
    sampler.will_send(words_of(0, &["answer", "question", "user"]));
    let reply = api.post(CHAT, &asked(&json!({"stop": ["tion us"]}))).await.ok();
    assert_eq!(reply["choices"][0]["message"]["content"], "answer ques");
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    gives_up(&sampler, 1).await;
    // A client that hangs up is one that waits for nothing.
    sampler.will_send(words_of(0, &["answer"]));
    let request = api.request(Method::POST, CHAT).json(&asked(&json!({})));
    let waiting = tokio::spawn(request.send());
    while sampler.orders() < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    waiting.abort();
    gives_up(&sampler, 2).await;
}

async fn gives_up(sampler: &FakeSampler, times: usize) {
    for _ in 0..600 {
        if sampler.hung_up() == times {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("orders go on that nobody waits for");
}

#[tokio::test]
async fn calls_to_tools_are_read_out_of_the_answer() {
    let (api, sampler) = world().await;
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    // The test's tokenizer has no braces, so this is what is no call.
    sampler.will_say(&["answer"], EndReason::Stop);
    let reply = api.post(CHAT, &asked(&json!({"tools": tools}))).await.ok();
    assert_eq!(reply["choices"][0]["finish_reason"], "stop");
    assert_eq!(reply["choices"][0]["message"]["content"], "answer");
    assert_eq!(reply["choices"][0]["message"].get("tool_calls"), None);
}

#[tokio::test]
async fn tuned_models_and_checkpoints_are_asked_for_by_their_names() {
    let api = TestApi::with(|config| {
        config.model_aliases.insert("gpt".to_owned(), BASE.to_owned());
    });
    let api = api.await.with_base_model().await;
    let sampler = FakeSampler::start(&api.store).await;
    let job = api.succeeded_job(json!({"n_epochs": 1})).await;
    let name = job["fine_tuned_model"].as_str().expect("name");
    let checkpoint = format!("{name}:ckpt-step-10");
    for model in [name, &checkpoint] {
        let reply = api.post(CHAT, &asked(&json!({"model": model}))).await.ok();
        assert_eq!(reply["model"], model);
        let tuned = sampler.last_order().tuned.expect("tuned weights");
        let id = job["id"].as_str().expect("id").into();
        let place = CheckpointPlace { job: id, attempt: 1, step: 10 };
        assert_eq!(tuned.place, WeightsPlace::Checkpoint(place));
        assert_eq!(tuned.kind, AdapterType::Lora);
        let stranger = api.stranger().await.post(CHAT, &asked(&json!({"model": model}))).await;
        assert_eq!(stranger.error(404)["code"], "no_such_model");
    }
    let full = api.succeeded_job(json!({"n_epochs": 1, "adapter": {"type": "full"}})).await;
    api.post(CHAT, &asked(&json!({"model": full["fine_tuned_model"]}))).await.ok();
    assert_eq!(sampler.last_order().tuned.expect("weights").kind, AdapterType::Full);
    let reply = api.post(CHAT, &asked(&json!({"model": "gpt"}))).await.ok();
    assert_eq!((&reply["model"], sampler.last_order().tuned), (&json!("gpt"), None));
    let error = api.post(CHAT, &asked(&json!({"model": "nope"}))).await.error(404);
    assert_eq!((&error["param"], &error["code"]), (&json!("model"), &json!("no_such_model")));
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_is_refused_with_the_numbers() {
    let (api, _sampler) = world().await;
    let error = api.post(CHAT, &asked(&json!({"max_tokens": 60}))).await.error(400);
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("context_length_exceeded"), &json!("messages"))
    );
    let message = error["message"].as_str().expect("text");
    assert!(message.contains("64 tokens") && message.contains("66 tokens (6 in"), "{message}");
    let long = json!({"model": BASE, "prompt": "question ".repeat(64)});
    let error = api.post(PLAIN, &long).await.error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let error = api.post(CHAT, &asked(&json!({"logit_bias": {"700": 1}}))).await.error(400);
    assert_eq!(error["param"], "logit_bias");
}

#[tokio::test]
async fn without_a_sampler_the_reply_says_how_to_start_one() {
    let api = TestApi::start().await.with_base_model().await;
    // One that is not there any more changes nothing.
    announce_sampler(&api.store, "http://127.0.0.1:9").await;
    for (path, body) in [(CHAT, asked(&json!({}))), (PLAIN, json!({"model": BASE, "prompt": "a"}))]
    {
        let error = api.post(path, &body).await.error(503);
        assert_eq!(
            (&error["code"], &error["param"]),
            (&json!("model_not_served"), &json!("model"))
        );
        assert!(error["message"].as_str().expect("text").contains("`tunesmith sampler`"));
        assert_eq!(api.post(path, &json!({})).await.error(400)["param"], "model");
    }
}

#[tokio::test]
async fn what_fails_at_the_sampler_is_told_before_the_answer_and_within() {
    let (api, sampler) = world().await;
    let failed =
        || SampleLine::Failed { error: ApiError::new(ErrorCode::SamplerFailed, "it died") };
    for stream in [false, true] {
        sampler.will_send(vec![SampleLine::Waiting, failed()]);
        let error = api.post(CHAT, &asked(&json!({"stream": stream}))).await.error(500);
        assert_eq!(
            (&error["code"], &error["message"]),
            (&json!("sampler_failed"), &json!("it died"))
        );
    }
    let mut lines = words_of(0, &["answer"]);
    lines.push(failed());
    sampler.will_send(lines);
    let reply = api.post(CHAT, &asked(&json!({"stream": true}))).await;
    let text = String::from_utf8(reply.body).expect("text");
    let last = text.trim_end().rsplit("\n\n").next().expect("an event");
    assert!(last.starts_with("data: {\"error\":{\"message\":\"it died\""), "{text}");
}

#[tokio::test]
async fn a_plain_completion_is_shown_as_the_sdks_declare_it() {
    let (api, sampler) = world().await;
    sampler.will_say(&["answer", "user"], EndReason::Length);
    let body = json!({"model": BASE, "prompt": "question", "logprobs": 1, "top_k": 1});
    let reply = api.post(PLAIN, &body).await;
    let warning = reply.header("x-tunesmith-warning").expect("a warning").to_owned();
    assert_eq!(warning, "Unknown fields were ignored: top_k.");
    assert_json_snapshot!(reply.ok(), {".id" => "[id]", ".created" => "[time]"}, @r#"
    {
      "id": "[id]",
      "object": "text_completion",
      "created": "[time]",
      "model": "tiny",
      "choices": [
        {
          "text": " answer user",
          "index": 0,
          "logprobs": {
            "tokens": [
              "answer",
              "user"
            ],
            "token_logprobs": [
              -0.5,
              -0.5
            ],
            "top_logprobs": [
              {
                "answer": -0.5,
                "user": -1.5
              },
              {
                "user": -1.5
              }
            ],
            "text_offset": [
              0,
              7
            ]
          },
          "finish_reason": "length"
        }
      ],
      "usage": {
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "total_tokens": 3,
        "prompt_tokens_details": {
          "cached_tokens": 2
        }
      }
    }
    "#);
    assert_eq!(sampler.last_order().sampling.max_tokens, 16);
    let many =
        json!({"model": BASE, "prompt": [[5], [6, 5]], "n": 2, "echo": true, "max_tokens": 3});
    let reply = api.post(PLAIN, &many).await.ok();
    let texts: Vec<_> = reply["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|choice| {
            (choice["index"].as_u64().expect("index"), choice["text"].as_str().expect("text"))
        })
        .collect();
    assert_eq!(
        texts,
        [
            (0, "question answer"),
            (1, "question answer"),
            (2, "answer question answer"),
            (3, "answer question answer")
        ]
    );
    assert_eq!(reply["usage"]["prompt_tokens"], 3);
    let mut streamed = many.clone();
    streamed["stream"] = json!(true);
    let mut found = vec![String::new(); 4];
    for chunk in events(&api.post(PLAIN, &streamed).await) {
        let choice = &chunk["choices"][0];
        found[choice["index"].as_u64().expect("index") as usize] +=
            choice["text"].as_str().expect("text");
    }
    assert_eq!(found, texts.iter().map(|(_, text)| *text).collect::<Vec<_>>());
    let figures = String::from_utf8(api.get("/metrics").await.body).expect("text");
    assert!(figures.contains("tunesmith_tokens_total{kind=\"completion\"} 10"), "{figures}");
    assert!(figures.contains("tunesmith_time_to_first_token_seconds_count 5"), "{figures}");
}
