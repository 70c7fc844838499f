//! Ids as they stand on the wire: a prefix and 24 random letters and digits.
//!
//! An id is opaque text to everything but [`generate`](FileId::generate), so an id of another
//! shape, out of an older system, is simply one that is not found.

use rand::{Rng, RngExt as _};
use serde::{Deserialize, Serialize};
use std::fmt;

const ALPHABET: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

/// `length` letters and digits from `rng`, each of 62 equally likely.
pub fn random_text(rng: &mut impl Rng, length: usize) -> String {
    (0..length).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// What every generated id begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A new id.
            pub fn generate(rng: &mut impl Rng) -> Self {
                Self(format!("{}{}", Self::PREFIX, random_text(rng, 24)))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl From<String> for $name {
            fn from(text: String) -> Self {
                Self(text)
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                Self(text.to_owned())
            }
        }
    )*};
}

ids! {
    /// An organisation, the owner of projects.
    OrganizationId = "org-";
    /// A project: the tenant. Everything a client can name belongs to one.
    ProjectId = "proj_";
    /// An API key's row, not its secret.
    ApiKeyId = "key_";
    /// The row of a key to an organisation's projects and keys.
    AdminKeyId = "admkey_";
    /// A project's leave to use another project's checkpoint.
    PermissionId = "cp_";
    /// An uploaded or produced file.
    FileId = "file-";
    /// A file that comes in parts.
    UploadId = "upload_";
    /// A part of one.
    UploadPartId = "part_";
    /// A fine-tuning job.
    JobId = "ftjob-";
    /// An event of a job.
    EventId = "ftevent-";
    /// A checkpoint of a job.
    CheckpointId = "ftckpt_";
    /// A file of requests that is answered.
    BatchId = "batch_";
    /// Who is told of the end of jobs.
    WebhookEndpointId = "whe_";
    /// An adapter that was made elsewhere.
    ImportedAdapterId = "adapter_";
    /// A base model in this installation.
    BaseModelId = "basemodel_";
    /// A worker process.
    WorkerId = "worker_";
    /// A sampler process.
    SamplerId = "sampler_";
}

/// A secret API key: `sk-` and 48 random letters and digits. Only its hash is stored.
pub fn generate_api_key(rng: &mut impl Rng) -> String {
    format!("sk-{}", random_text(rng, 48))
}

/// What every admin key begins with.
pub const ADMIN_KEY_PREFIX: &str = "sk-admin-";

/// A secret admin key: `sk-admin-` and 48 random letters and digits. Only its hash is stored.
pub fn generate_admin_key(rng: &mut impl Rng) -> String {
    format!("{ADMIN_KEY_PREFIX}{}", random_text(rng, 48))
}

/// The tuned model's name, `ft:<base>:<org>:<suffix>:<8>`; the suffix may be empty.
pub fn tuned_model_name(
    base: &str,
    organization: &str,
    suffix: Option<&str>,
    rng: &mut impl Rng,
) -> String {
    format!("ft:{base}:{organization}:{}:{}", suffix.unwrap_or_default(), random_text(rng, 8))
}

/// The name under which a checkpoint of `tuned_model` is served.
#[must_use]
pub fn checkpoint_model_name(tuned_model: &str, step: u64) -> String {
    format!("{tuned_model}:ckpt-step-{step}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng as _;

    #[test]
    fn a_generated_id_carries_its_prefix_and_24_letters_and_digits() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let id = JobId::generate(&mut rng);
        let random = id.as_str().strip_prefix("ftjob-").expect("prefix");
        assert_eq!(random.len(), 24);
        assert!(random.chars().all(|c| c.is_ascii_alphanumeric()));
        assert_ne!(id, JobId::generate(&mut rng));
    }

    #[test]
    fn a_model_name_without_suffix_keeps_its_empty_place() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let plain = tuned_model_name("smol", "org", None, &mut rng);
        assert!(plain.starts_with("ft:smol:org::"), "{plain}");
        let named = tuned_model_name("smol", "org", Some("acme"), &mut rng);
        assert!(named.starts_with("ft:smol:org:acme:"), "{named}");
        assert_eq!(checkpoint_model_name("ft:a:b::c", 7), "ft:a:b::c:ckpt-step-7");
    }
}
