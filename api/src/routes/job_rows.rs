//! `GET /v1/fine_tuning/jobs/{id}/rows`: training rows ranked by their last loss. Ours.
//!
//! A row that the model still finds improbable after training on it is hard, rare, or wrong.

use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value};
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use actix_web::web;
use schemars::JsonSchema;
use serde::Serialize;
use tunesmith_core::hyperparameters::Method;
use tunesmith_core::ids::JobId;
use tunesmith_core::metrics::{MAX_ROW_LOSSES, RowLoss};
use tunesmith_store::row_losses::RowOrder;

pub(super) const DEFAULT_ROWS: u64 = 20;
pub(super) const MAX_ROWS: u64 = 1000;

/// A row on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct RowObject {
    /// The row's number, by which the list goes on.
    id: String,
    object: &'static str,
    /// Where it begins in the training file, from 1.
    line: u64,
    /// The weighted mean of −log p over its targets.
    loss: f64,
    /// The step that trained on it last, before whose update the loss was measured.
    step: u64,
}

impl From<RowLoss> for RowObject {
    fn from(row: RowLoss) -> Self {
        let RowLoss { row, line, step, loss } = row;
        Self { id: row.to_string(), object: "fine_tuning.job.row", line, loss, step }
    }
}

/// The rows, those with the highest loss first unless `order=line` asks for the file's order.
pub(crate) async fn rows(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
) -> Result<web::Json<Page<RowObject>>, Failure> {
    let order = match query.word("order", &["loss", "line"])? {
        "line" => RowOrder::Line,
        _ => RowOrder::Loss,
    };
    let limit = query.integer("limit", 1..=MAX_ROWS, DEFAULT_ROWS)?;
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let after = match query.text("after") {
        None => None,
        Some(_) => Some(query.integer("after", 0..=MAX_ROW_LOSSES, 0)?),
    };
    let job = state.store.job(&caller.project_id, &JobId::from(id.into_inner())).await?;
    if job.method != Method::Supervised {
        let given = format!("{}, a job of method '{}'", job.id, job.method.as_str());
        let rule = "a job of method 'supervised': a pair's loss is not that of one row";
        return Err(invalid_value("fine_tune_id", given, rule).into());
    }
    let page =
        state.store.list_row_losses(&caller.project_id, &job.id, order, after, limit).await?;
    let rows = page.items.into_iter().map(RowObject::from).collect();
    Ok(web::Json(Page::new(rows, page.has_more, |row| &row.id)))
}

#[cfg(test)]
mod tests {
    use crate::testing::TestApi;
    use serde_json::{Value, json};
    use tunesmith_core::metrics::RowLoss;

    const LOSSES: [f64; 4] = [0.5, 2.5, 0.5, 1.25];

    /// A running job with the losses of four rows, which lie on every third line.
    async fn job_with_losses(api: &TestApi) -> String {
        let id = api.start_job().await;
        api.accept(&id).await;
        let claimed = api.run_for(&id, 2).await;
        let row = |(row, &loss): (usize, &f64)| RowLoss {
            row: row as u64,
            line: 1 + 3 * row as u64,
            step: 2,
            loss,
        };
        let losses: Vec<_> = LOSSES.iter().enumerate().map(row).collect();
        api.store.record_row_losses(&claimed.lease, &losses).await.expect("losses");
        id
    }

    fn lines(page: &Value) -> Vec<u64> {
        let rows = page["data"].as_array().expect("data");
        rows.iter().map(|row| row["line"].as_u64().expect("line")).collect()
    }

    #[tokio::test]
    async fn rows_are_ranked_by_their_loss_page_by_page() {
        let api = TestApi::start().await.with_base_model().await;
        let path = format!("/v1/fine_tuning/jobs/{}/rows", job_with_losses(&api).await);
        let page = api.get(&format!("{path}?order=loss")).await.ok();
        assert_eq!((lines(&page), &page["has_more"]), (vec![4, 10, 1, 7], &json!(false)));
        assert_eq!(
            page["data"][0],
            json!({"id": "1", "object": "fine_tuning.job.row", "line": 4, "loss": 2.5, "step": 2})
        );
        let first = api.get(&format!("{path}?limit=3")).await.ok();
        assert_eq!((lines(&first), &first["has_more"]), (vec![4, 10, 1], &json!(true)));
        let last = first["last_id"].as_str().expect("last");
        let rest = api.get(&format!("{path}?limit=3&after={last}")).await.ok();
        assert_eq!((lines(&rest), &rest["has_more"]), (vec![7], &json!(false)));
        let page = api.get(&format!("{path}?order=line&limit=2&after=0")).await.ok();
        assert_eq!(lines(&page), [4, 7]);
    }

    #[tokio::test]
    async fn wrong_orders_cursors_and_strangers_are_refused() {
        let api = TestApi::start().await.with_base_model().await;
        let path = format!("/v1/fine_tuning/jobs/{}/rows", job_with_losses(&api).await);
        assert_eq!(api.get(&format!("{path}?order=size")).await.error(400)["param"], "order");
        assert_eq!(api.get(&format!("{path}?after=77")).await.error(400)["param"], "after");
        api.stranger().await.get(&path).await.error(404);
    }
}
