use crate::testing::TestApi;
use insta::assert_json_snapshot;
use serde_json::{Value, json};

const JOBS: &str = "/v1/fine_tuning/jobs";

fn messages(page: &Value) -> Vec<&str> {
    let data = page["data"].as_array().expect("data");
    data.iter().map(|event| event["message"].as_str().expect("message")).collect()
}

#[tokio::test]
async fn events_tell_the_job_from_its_end_to_its_beginning() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    let id = job["id"].as_str().expect("id");
    let events = api.get(&format!("{JOBS}/{id}/events")).await.ok();
    let mut oldest_first = messages(&events);
    oldest_first.reverse();
    let file = job["training_file"].as_str().expect("file");
    let checkpoints = api.get(&format!("{JOBS}/{id}/checkpoints")).await.ok();
    let checkpoint = checkpoints["data"][0]["id"].as_str().expect("id");
    let model = job["fine_tuned_model"].as_str().expect("model");
    assert_eq!(
        oldest_first,
        [
            format!("Created fine-tuning job: {id}"),
            format!("Validating training file: {file}"),
            "Files validated, moving job to queued state".to_owned(),
            "Fine-tuning job started".to_owned(),
            format!("Checkpoint created at step 10 with Snapshot ID: {checkpoint}"),
            format!("New fine-tuned model created: {model}"),
            "The job has successfully completed.".to_owned(),
        ]
    );
    assert_json_snapshot!(events["data"][0], {".id" => "[id]", ".created_at" => "[time]"}, @r#"
    {
      "id": "[id]",
      "object": "fine_tuning.job.event",
      "created_at": "[time]",
      "level": "info",
      "message": "The job has successfully completed.",
      "type": "message",
      "data": null
    }
    "#);
}

#[tokio::test]
async fn events_come_in_pages() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let page = api.get(&format!("{JOBS}/{id}/events?limit=1")).await.ok();
    assert_eq!(page["has_more"], true);
    let last = page["last_id"].as_str().expect("id");
    let rest = api.get(&format!("{JOBS}/{id}/events?limit=1&after={last}")).await.ok();
    assert_eq!(messages(&rest), [format!("Created fine-tuning job: {id}")]);
    assert_eq!(rest["has_more"], false);
}

#[tokio::test]
async fn a_checkpoint_is_shown_as_the_sdks_declare_it() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    let id = job["id"].as_str().expect("id");
    let page = api.get(&format!("{JOBS}/{id}/checkpoints")).await.ok();
    let model = job["fine_tuned_model"].as_str().expect("model");
    assert_eq!(page["data"][0]["fine_tuned_model_checkpoint"], format!("{model}:ckpt-step-10"));
    assert_json_snapshot!(page, {
        ".data[].id" => "[id]", ".first_id" => "[id]", ".last_id" => "[id]",
        ".data[].created_at" => "[time]", ".data[].fine_tuning_job_id" => "[job]",
        ".data[].fine_tuned_model_checkpoint" => "[model]",
    }, @r#"
    {
      "object": "list",
      "data": [
        {
          "id": "[id]",
          "object": "fine_tuning.job.checkpoint",
          "created_at": "[time]",
          "fine_tuned_model_checkpoint": "[model]",
          "fine_tuning_job_id": "[job]",
          "step_number": 10,
          "metrics": {
            "step": 10,
            "train_loss": 0.4,
            "train_mean_token_accuracy": 0.5,
            "valid_loss": 0.5,
            "valid_mean_token_accuracy": 0.25
          }
        }
      ],
      "first_id": "[id]",
      "last_id": "[id]",
      "has_more": false
    }
    "#);
}

#[tokio::test]
async fn the_curve_comes_whole_with_what_a_picture_needs() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    let path = format!("{JOBS}/{id}/metrics");
    let before = api.get(&path).await.ok();
    assert_eq!((&before["data"], &before["total_steps"]), (&json!([]), &Value::Null));
    api.accept(&id).await;
    api.run_for(&id, 2).await;
    let curve = api.get(&path).await.ok();
    assert_json_snapshot!(curve, @r#"
    {
      "object": "list",
      "data": [
        {
          "step": 1,
          "epoch": 0.5,
          "train_loss": 4.0,
          "train_mean_token_accuracy": 0.5,
          "valid_loss": null,
          "valid_mean_token_accuracy": null,
          "full_valid_loss": null,
          "full_valid_mean_token_accuracy": null,
          "learning_rate": 0.0002,
          "grad_norm": 1.5,
          "tokens": 100,
          "tokens_per_second": 50.0,
          "elapsed_seconds": 2.0
        },
        {
          "step": 2,
          "epoch": 1.0,
          "train_loss": 2.0,
          "train_mean_token_accuracy": 0.5,
          "valid_loss": 2.5,
          "valid_mean_token_accuracy": 0.25,
          "full_valid_loss": null,
          "full_valid_mean_token_accuracy": null,
          "learning_rate": 0.0002,
          "grad_norm": 1.5,
          "tokens": 200,
          "tokens_per_second": 50.0,
          "elapsed_seconds": 4.0
        }
      ],
      "has_more": false,
      "total_steps": 10,
      "initial_valid_loss": 5.5,
      "train_rows": 10,
      "valid_rows": 2,
      "truncated_rows": 1,
      "device": "cpu",
      "precision": "fp32"
    }
    "#);
    let rest = api.get(&format!("{path}?after=1")).await.ok();
    assert_eq!(rest["data"].as_array().expect("data").len(), 1);
    assert_eq!(rest["data"][0]["step"], 2);
}

/// A stream of server-sent events that is still open.
struct Stream {
    response: reqwest::Response,
    text: String,
}

impl Stream {
    async fn open(api: &TestApi, path: &str, last_event_id: Option<&str>) -> Self {
        let mut request = api.request(reqwest::Method::GET, path);
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let response = request.header("Accept-Encoding", "gzip").send().await.expect("a reply");
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, text: String::new() }
    }

    /// The next event: its id, where it has one, and its data.
    async fn next(&mut self) -> Option<(Option<String>, String)> {
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let line = |name| event.lines().find_map(|line| line.strip_prefix(name));
                let found = (line("id: ").map(str::to_owned), line("data: ").map(str::to_owned));
                self.text = rest.to_owned();
                // Else a comment.
                if let (id, Some(data)) = found {
                    return Some((id, data));
                }
                continue;
            }
            let wait = std::time::Duration::from_secs(60);
            let chunk = tokio::time::timeout(wait, self.response.chunk());
            let chunk = chunk.await.expect("nothing came").expect("a whole body")?;
            self.text.push_str(std::str::from_utf8(&chunk).expect("text"));
        }
    }

    async fn data(&mut self) -> Value {
        let (_, data) = self.next().await.expect("the stream ended");
        serde_json::from_str(&data).unwrap_or_else(|_| panic!("no JSON: {data}"))
    }

    /// All that still comes, the last line of which must say that it is the last.
    async fn rest(mut self) -> Vec<Value> {
        let mut rest = Vec::new();
        while let Some((_, data)) = self.next().await {
            if data == "[DONE]" {
                assert_eq!(self.next().await, None, "something came after the end");
                return rest;
            }
            rest.push(serde_json::from_str(&data).expect("JSON"));
        }
        panic!("the stream ended without saying so");
    }
}

#[tokio::test]
async fn a_stream_tells_what_was_said_then_each_event_as_it_comes_and_ends_with_the_job() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let id = api.start_job().await;
    let path = format!("{JOBS}/{id}/events?stream=true");
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(Stream::open(&api, &path, None).await);
    }
    for stream in &mut streams {
        let event = stream.data().await;
        assert_eq!(event["message"], format!("Created fine-tuning job: {id}"));
        assert_eq!(event["object"], "fine_tuning.job.event");
    }
    api.validated(&id).await;
    api.post(&format!("{JOBS}/{id}/cancel"), &json!({})).await.ok();
    let stored = api.get(&format!("{JOBS}/{id}/events")).await.ok();
    let mut expected: Vec<Value> = stored["data"].as_array().expect("data").clone();
    expected.reverse();
    for stream in streams {
        assert_eq!(stream.rest().await, expected[1..]);
    }
    // Of a job that has ended the stream tells all and ends as well.
    assert_eq!(Stream::open(&api, &path, None).await.rest().await, expected);
}

#[tokio::test]
async fn a_stream_goes_on_behind_the_last_event_that_the_client_has() {
    let api = TestApi::with_validator().await.with_base_model().await;
    let id = api.start_job().await;
    api.validated(&id).await;
    api.post(&format!("{JOBS}/{id}/cancel"), &json!({})).await.ok();
    let path = format!("{JOBS}/{id}/events?stream=true");
    let mut stream = Stream::open(&api, &path, None).await;
    let (first, _) = stream.next().await.expect("an event");
    let rest = stream.rest().await;
    assert!(!rest.is_empty());
    let again = Stream::open(&api, &path, first.as_deref()).await;
    assert_eq!(again.rest().await, rest);
    let after = format!("{path}&after={}", first.expect("id"));
    assert_eq!(Stream::open(&api, &after, None).await.rest().await, rest);
}

#[tokio::test]
async fn a_stream_of_metrics_sends_each_step_with_the_place_to_go_on_from() {
    let api = TestApi::start().await.with_base_model().await;
    let job = api.succeeded_job(json!({})).await;
    let id = job["id"].as_str().expect("id");
    let curve = api.get(&format!("{JOBS}/{id}/metrics")).await.ok();
    let path = format!("{JOBS}/{id}/metrics?stream=true");
    let mut stream = Stream::open(&api, &path, None).await;
    let (place, first) = stream.next().await.expect("a step");
    let first: Value = serde_json::from_str(&first).expect("JSON");
    let rest = stream.rest().await;
    let steps: Vec<Value> = std::iter::once(first).chain(rest.clone()).collect();
    assert_eq!(json!(steps), curve["data"]);
    let again = Stream::open(&api, &path, place.as_deref()).await;
    assert_eq!(again.rest().await, rest);
}

#[tokio::test]
async fn a_stream_is_refused_like_any_request() {
    let api = TestApi::start().await.with_base_model().await;
    let id = api.start_job().await;
    for part in ["events", "metrics"] {
        let path = format!("{JOBS}/{id}/{part}?stream=true");
        assert_eq!(api.stranger().await.get(&path).await.error(404)["code"], "fine_tune_not_found");
        assert_eq!(api.client_with(None).get(&path).await.error(401)["code"], "invalid_api_key");
        let wrong = format!("{JOBS}/{id}/{part}?stream=perhaps");
        assert_eq!(api.get(&wrong).await.error(400)["param"], "stream");
    }
    let path = format!("{JOBS}/{id}/events?stream=true&after=ftevent-nope");
    assert_eq!(api.get(&path).await.error(400)["param"], "after");
    let request = api.request(reqwest::Method::GET, &format!("{JOBS}/{id}/metrics?stream=true"));
    let reply = crate::testing::Reply::of(request.header("Last-Event-ID", "x")).await;
    assert_eq!(reply.error(400)["param"], "Last-Event-ID");
}

#[tokio::test]
async fn open_streams_end_when_the_server_stops() {
    let mut api = TestApi::with_validator().await.with_base_model().await;
    let id = api.start_job().await;
    let mut stream = Stream::open(&api, &format!("{JOBS}/{id}/events?stream=true"), None).await;
    stream.data().await;
    api.stop();
    while let Some((_, data)) = stream.next().await {
        assert_ne!(data, "[DONE]", "the job has not ended");
    }
}
