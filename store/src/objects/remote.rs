//! Stores that are reached over a network, and the one in memory.

use super::Objects;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::signer::Signer;
use object_store::{ObjectStore, ObjectStoreScheme, Result};
use std::sync::Arc;
use url::Url;

/// Opens `url` with the settings that the builder of its kind knows, by their names in lower case.
pub(super) fn open(
    url: &Url,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<Objects> {
    macro_rules! cloud {
        ($builder:ty) => {{
            let builder = <$builder>::new().with_url(url.to_string());
            let builder =
                settings.into_iter().fold(builder, |builder, (name, value)| match name.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                });
            let store = Arc::new(builder.build()?);
            (Arc::clone(&store) as Arc<dyn ObjectStore>, Some(store as Arc<dyn Signer>))
        }};
    }
    let (scheme, prefix) = ObjectStoreScheme::parse(url)?;
    let (store, signer) = match scheme {
        ObjectStoreScheme::AmazonS3 => cloud!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => cloud!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => cloud!(MicrosoftAzureBuilder),
        _ => (Arc::new(InMemory::new()) as Arc<dyn ObjectStore>, None),
    };
    Ok(Objects {
        store: Arc::new(PrefixStore::new(store, prefix.clone())),
        signer: signer.map(|signer| (signer, prefix)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKey;
    use std::time::Duration;

    const HOUR: Duration = Duration::from_secs(3600);

    fn opened(url: &str, settings: &[(&str, &str)]) -> Objects {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let settings = settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        open(&url.parse().expect("url"), settings).expect("opened")
    }

    fn query(url: &Url, name: &str) -> Option<String> {
        url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    #[tokio::test]
    async fn s3_signs_the_address_of_one_object_for_as_long_as_is_said() {
        let objects = opened(
            "s3://bucket/some/where",
            &[
                ("aws_access_key_id", "AKIDEXAMPLE"),
                ("aws_secret_access_key", "wJalrXUtnFEMI"),
                ("aws_region", "eu-central-1"),
                ("aws_endpoint", "http://127.0.0.1:9"),
                ("aws_allow_http", "true"),
                ("home", "not a setting"),
            ],
        );
        let key = ObjectKey::File("file-a b".into());
        let url = objects.signed_url(&key, HOUR).await.expect("signed").expect("S3 signs");
        assert_eq!(url.origin().ascii_serialization(), "http://127.0.0.1:9");
        assert_eq!(url.path(), "/bucket/some/where/files/file-a%20b");
        assert_eq!(query(&url, "X-Amz-Algorithm").as_deref(), Some("AWS4-HMAC-SHA256"));
        assert_eq!(query(&url, "X-Amz-Expires").as_deref(), Some("3600"));
        let credential = query(&url, "X-Amz-Credential").expect("who signs");
        assert!(credential.starts_with("AKIDEXAMPLE/"), "{credential}");
        assert!(credential.ends_with("/eu-central-1/s3/aws4_request"), "{credential}");
        let signature = query(&url, "X-Amz-Signature").expect("signature");
        assert!(signature.len() == 64 && signature.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert!(!url.as_str().contains("wJalrXUtnFEMI"));
        let other = objects.signed_url(&ObjectKey::File("b".into()), HOUR).await;
        let other = other.expect("signed").expect("S3 signs");
        assert_ne!(query(&other, "X-Amz-Signature"), Some(signature), "one object alone");
    }

    #[tokio::test]
    async fn azure_signs_with_the_account_key() {
        let objects = opened(
            "az://container/some",
            &[("azure_storage_account_name", "account"), ("azure_storage_account_key", "c2VjcmV0")],
        );
        let url = objects.signed_url(&ObjectKey::File("a".into()), HOUR).await;
        let url = url.expect("signed").expect("Azure signs");
        assert_eq!(url.host_str(), Some("account.blob.core.windows.net"));
        assert_eq!(url.path(), "/container/some/files/a");
        assert_eq!(query(&url, "sp").as_deref(), Some("r"), "to read");
        assert!(query(&url, "sig").is_some() && query(&url, "se").is_some(), "{url}");
    }

    #[tokio::test]
    async fn memory_and_directories_sign_nothing() {
        let directory = tempfile::tempdir().expect("directory");
        let local = Objects::open(&format!("file://{}", directory.path().display()));
        for objects in [opened("memory:///", &[]), local.expect("directory")] {
            let url = objects.signed_url(&ObjectKey::File("a".into()), HOUR).await;
            assert_eq!(url.expect("no error"), None);
        }
    }
}
