use super::*;
use crate::test_db::TestDb;
use futures::FutureExt as _;

async fn open_transactions(pool: &PgPool) -> i64 {
    sqlx::query_scalar(
        "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()
           AND state LIKE 'idle in transaction%'",
    )
    .fetch_one(pool)
    .await
    .expect("activity")
}

#[tokio::test]
async fn a_begin_that_is_dropped_half_way_leaves_no_transaction_open() {
    let db = TestDb::new().await;
    let pool = &db.store().pool;
    for polls in 0..40 {
        let mut begun = Box::pin(begin(pool));
        // Dropped at another point each time, with the database's answer under way.
        for _ in 0..polls % 8 {
            if begun.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(begun);
    }
    let none_is_left = async {
        while open_transactions(pool).await > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), none_is_left)
        .await
        .expect("a transaction stays open");
}

#[tokio::test]
async fn a_transaction_that_is_dropped_is_rolled_back() {
    let db = TestDb::new().await;
    let pool = &db.store().pool;
    let mut transaction = begin(pool).await.expect("begin");
    sqlx::query("CREATE TABLE half_done (x int)").execute(&mut *transaction).await.expect("table");
    drop(transaction);
    let there: bool = sqlx::query_scalar("SELECT to_regclass('half_done') IS NOT NULL")
        .fetch_one(pool)
        .await
        .expect("table");
    assert!(!there);
}

#[tokio::test]
async fn every_connection_ends_transactions_that_hang() {
    let db = TestDb::new().await;
    let limit: String = sqlx::query_scalar("SHOW idle_in_transaction_session_timeout")
        .fetch_one(&db.store().pool)
        .await
        .expect("setting");
    assert_eq!(limit, "30s");
}

#[tokio::test]
async fn a_database_that_does_not_answer_is_a_transient_error() {
    let error = connect("postgres://nobody@localhost:1/nothing?host=/nowhere").await;
    let error = error.expect_err("nobody there");
    assert!(error.is_transient(), "{error}");
}
