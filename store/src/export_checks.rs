//! Exports that were compared with the served model and passed.

use crate::{Store, StoreError, rows};
use sqlx::postgres::PgRow;
use sqlx::types::Json;
use sqlx::{FromRow, PgConnection};
use tunesmith_core::export_check::{ExportForm, PassedCheck};
use tunesmith_core::weights::ManifestFile;

/// A check, and the very files that it was made of.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckedExport {
    /// What came of it.
    pub check: PassedCheck,
    /// The export's files, in the archive's order.
    pub files: Vec<ManifestFile>,
}

impl FromRow<'_, PgRow> for CheckedExport {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        Ok(Self { check: rows::json(row, "result")?, files: rows::json(row, "files")? })
    }
}

impl Store {
    /// The check of an export of the model or checkpoint `model` by this `version` of the program.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn checked_export(
        &self,
        model: &str,
        form: ExportForm,
        version: &str,
    ) -> Result<Option<CheckedExport>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT result, files FROM export_checks
             WHERE model = $1 AND form = $2 AND version = $3",
        )
        .bind(model)
        .bind(form.to_string())
        .bind(version)
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Keeps a check in place of an earlier one.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn keep_checked_export(
        &self,
        model: &str,
        form: ExportForm,
        version: &str,
        checked: &CheckedExport,
    ) -> Result<(), StoreError> {
        sqlx::query(
            "INSERT INTO export_checks (model, form, version, result, files)
             VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (model, form) DO UPDATE SET version = $3, result = $4, files = $5",
        )
        .bind(model)
        .bind(form.to_string())
        .bind(version)
        .bind(Json(&checked.check))
        .bind(Json(&checked.files))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Forgets a check: what is exported now is not what was checked.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn forget_checked_export(
        &self,
        model: &str,
        form: ExportForm,
    ) -> Result<(), StoreError> {
        sqlx::query("DELETE FROM export_checks WHERE model = $1 AND form = $2")
            .bind(model)
            .bind(form.to_string())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}

/// Forgets all checks of a model that is being deleted.
pub(crate) async fn forget_model(
    connection: &mut PgConnection,
    model: &str,
) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM export_checks WHERE model = $1")
        .bind(model)
        .execute(connection)
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_db::TestDb;
    use tunesmith_core::export_check::{Bound, Comparison};
    use tunesmith_core::gguf::StorageType;
    use tunesmith_core::weights::FloatType;

    #[tokio::test]
    async fn a_check_is_of_one_model_form_and_version_until_it_is_forgotten() {
        let db = TestDb::new().await;
        let store = db.store();
        let comparison = Comparison {
            texts: 4,
            positions: 192,
            max_abs_error: 1.234_567_890_123e-5,
            relative_error: 0.1,
            argmax_agreement: 1.0 / 3.0,
            mean_kl: 7e-300,
            numbers: Some(FloatType::Bf16),
        };
        let form = ExportForm::Gguf(StorageType::Q8_0);
        let check = PassedCheck {
            checked: true,
            checked_at: 1_700_000_000,
            comparison,
            bound: Bound::of(form, None),
        };
        let file = ManifestFile::measure("model-q8_0.gguf", b"GGUF".as_slice()).expect("measure");
        let mut checked = CheckedExport { check, files: vec![file] };
        let found = async |form, version| store.checked_export("ft:a", form, version).await;
        assert_eq!(found(form, "1").await.expect("query"), None);
        store.keep_checked_export("ft:a", form, "1", &checked).await.expect("kept");
        assert_eq!(found(form, "1").await.expect("query").as_ref(), Some(&checked));
        assert_eq!(found(form, "2").await.expect("query"), None);
        assert_eq!(found(ExportForm::Adapter, "1").await.expect("query"), None);
        checked.files.clear();
        store.keep_checked_export("ft:a", form, "2", &checked).await.expect("kept");
        assert_eq!(found(form, "1").await.expect("query"), None);
        assert_eq!(found(form, "2").await.expect("query"), Some(checked));
        store.forget_checked_export("ft:a", form).await.expect("forgotten");
        assert_eq!(found(form, "2").await.expect("query"), None);
    }
}
