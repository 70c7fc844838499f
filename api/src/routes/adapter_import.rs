//! `POST /v1/models`: an adapter that was made elsewhere becomes a tuned model. Ours.
//!
//! The form's fields come in any order; the weights stream into the object store as they come, and
//! are checked against the base model's there.

use crate::adapter_file::Adapter;
use crate::auth::Authenticated;
use crate::failure::{Failure, invalid_value, missing};
use crate::form::{Form, announced_bytes, content_of, text_of};
use crate::idempotency::idempotency;
use crate::job_request::check_suffix;
use crate::routes::job_create::start_model;
use crate::routes::models::ModelObject;
use crate::server::AppState;
use crate::tensor_file::{TensorFile, Unusable, has_tensor};
use crate::warnings;
use actix_multipart::Field;
use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::ids::ImportedAdapterId;
use tunesmith_core::weights::{
    ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, MANIFEST_NAME, Manifest, ManifestFile, PeftConfig,
};
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::idempotency::Idempotency;
use tunesmith_store::imports::Importing;
use tunesmith_store::models::{Model, NewImportedAdapter};
use tunesmith_store::objects::{ObjectPrefix, Stored};
use tunesmith_store::tenants::Caller;

pub(super) const MODEL: &str = "model";
pub(super) const SUFFIX: &str = "suffix";
pub(super) const CONFIG: &str = "adapter_config";
pub(super) const WEIGHTS: &str = "adapter_model";

/// Takes the adapter in.
pub(crate) async fn create(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    payload: web::Payload,
) -> Result<HttpResponse, Failure> {
    let fields = "the fields 'model', 'adapter_config' and 'adapter_model'";
    let mut form = Form::of(&request, payload, fields)?;
    // What is asked for is known at the form's end; whether the header is in order, now.
    let asked = idempotency(&request, [0; 32])?;
    state.require_storage(&caller.project_id, announced_bytes(&request)).await?;
    let id = ImportedAdapterId::generate(&mut rand::rng());
    let importing = Importing::Adapter(id.clone());
    let mut import =
        Import { state: &state, prefix: importing.prefix(), id, sent: Sent::default() };
    state.store.begin_import(&importing).await?;
    let work = async {
        match import.receive(&mut form).await {
            Ok(()) => import.register(&caller, asked).await,
            Err(failure) => {
                form.drain().await;
                Err(failure)
            }
        }
    };
    // A client that goes away ends this here: the import is then found by its row.
    let imported = state.store.while_importing(&importing, work).await;
    if !imported.as_ref().is_ok_and(|model| model.weights() == importing.prefix()) {
        state.store.abandon_import(&importing).await;
    }
    let model = imported?;
    let mut reply = HttpResponse::Ok();
    let unknown = warnings::unknown_fields(&import.sent.unknown);
    warnings::add(&mut reply, unknown.as_slice());
    Ok(reply.json(ModelObject::from(&model)))
}

/// What the client has sent.
#[derive(Default)]
struct Sent {
    model: Option<String>,
    suffix: Option<String>,
    config: Option<Bytes>,
    weights: Option<Stored>,
    unknown: Vec<String>,
}

/// An adapter on its way in.
struct Import<'a> {
    state: &'a AppState,
    id: ImportedAdapterId,
    prefix: ObjectPrefix,
    sent: Sent,
}

impl Import<'_> {
    async fn receive(&mut self, form: &mut Form) -> Result<(), Failure> {
        while let Some((name, part)) = form.field().await? {
            match name.as_str() {
                WEIGHTS => self.store_weights(part).await?,
                CONFIG => self.sent.config = Some(text_of(part, CONFIG).await?.into()),
                MODEL => self.sent.model = Some(text_of(part, MODEL).await?),
                SUFFIX => self.sent.suffix = Some(text_of(part, SUFFIX).await?),
                _ => self.sent.unknown.push(name),
            }
        }
        Ok(())
    }

    async fn store_weights(&mut self, part: Field) -> Result<(), Failure> {
        if self.sent.weights.is_some() {
            return Err(invalid_value(WEIGHTS, "given twice", "one file").into());
        }
        let content = content_of(part);
        let key = self.prefix.file(ADAPTER_WEIGHTS_NAME);
        let stored =
            self.state.store.objects().put_stream(&key, content, self.state.max_file_bytes).await?;
        self.sent.weights = Some(stored);
        Ok(())
    }

    /// Checks everything, and makes the model.
    async fn register(&mut self, caller: &Caller, asked: Idempotency) -> Result<Model, Failure> {
        let Sent { model, suffix, config, weights, .. } = &self.sent;
        let name = model.as_deref().ok_or_else(|| missing(MODEL))?;
        let config = config.as_ref().ok_or_else(|| missing(CONFIG))?;
        let weights = weights.as_ref().ok_or_else(|| missing(WEIGHTS))?;
        let suffix = suffix.as_deref().map(check_suffix).transpose()?;
        // A form's bytes do not tell one wish from another: what parts it is another each time.
        let config_sha256 = hex::encode(Sha256::digest(config));
        let asked = asked.of(&json!([name, suffix, config_sha256, weights.sha256]));
        let (base, tuned) = self.base(caller, name).await?;
        let config = PeftConfig::parse(config).map_err(|error| refused(CONFIG, error))?;
        self.check(&base, &config, weights).await.map_err(|unusable| match unusable {
            Unusable::Broken(reason) => refused(WEIGHTS, reason).into(),
            Unusable::Unread(failure) => failure,
        })?;
        // Its own configuration may name another directory, and hold more than is known here.
        let config = PeftConfig { base_model: Some(base.name.clone()), ..config };
        self.store_manifest(&config, weights).await?;
        let new = NewImportedAdapter {
            id: self.id.clone(),
            base_model: match &tuned {
                Some(_) => base.origin_name().to_owned(),
                // An alias too.
                None => name.to_owned(),
            },
            tuned,
            base_model_id: base.id,
            suffix,
            adapter: config.adapter,
        };
        Ok(self.state.store.import_adapter(caller, &new, &asked).await?)
    }

    /// What the adapter is to go on, and the tuned model's name where it is one.
    async fn base(
        &self,
        caller: &Caller,
        name: &str,
    ) -> Result<(BaseModel, Option<String>), Failure> {
        match start_model(self.state, caller, name).await? {
            (base, None) => Ok((base, None)),
            (_, Some(tuned)) if tuned.adapter.kind == AdapterType::Full => {
                Ok((self.state.store.tuned_base(&tuned).await?, Some(tuned.name)))
            }
            (_, Some(_)) => {
                let rule = "a base model, or a tuned model of which every weight was trained: an \
                            adapter goes on no other adapter";
                Err(invalid_value(MODEL, name, rule).into())
            }
        }
    }

    /// Whether the adapter goes on `base`, tensor by tensor.
    async fn check(
        &self,
        base: &BaseModel,
        config: &PeftConfig,
        weights: &Stored,
    ) -> Result<(), Unusable> {
        let objects = self.state.store.objects();
        let files = TensorFile::all(objects, &base.prefix(), &base.manifest).await?;
        let file = TensorFile::open(objects, self.prefix.file(ADAPTER_WEIGHTS_NAME), weights.bytes)
            .await?;
        let adapter = Adapter::new(&config.adapter, file, |name| has_tensor(&files, name))?;
        adapter.check_fit_of_all(&files)?;
        let names = files.iter().flat_map(|file| file.tensors.keys()).map(String::as_str);
        Ok(config.check_modules(names, |name| adapter.pairs.contains_key(name))?)
    }

    async fn store_manifest(&self, config: &PeftConfig, weights: &Stored) -> Result<(), Failure> {
        let config = config.to_json().map_err(Failure::internal)?;
        let described = ManifestFile::measure(ADAPTER_CONFIG_NAME, config.as_bytes())
            .map_err(Failure::internal)?;
        let weights = ManifestFile {
            name: ADAPTER_WEIGHTS_NAME.to_owned(),
            bytes: weights.bytes,
            sha256: weights.sha256.clone(),
        };
        let manifest = Manifest { files: vec![described, weights] };
        let manifest = serde_json::to_vec_pretty(&manifest).map_err(Failure::internal)?;
        let objects = self.state.store.objects();
        objects.put_bytes(&self.prefix.file(ADAPTER_CONFIG_NAME), config.into()).await?;
        objects.put_bytes(&self.prefix.file(MANIFEST_NAME), manifest.into()).await?;
        Ok(())
    }
}

/// `400 invalid_value`: the adapter cannot be taken, and why.
fn refused(field: &str, reason: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::InvalidValue, format!("Invalid value for '{field}': {reason}."))
        .with_param(field)
}

#[cfg(test)]
mod tests;
