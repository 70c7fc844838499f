//! The signature of a delivery, as the Standard Webhooks specification has it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::Rng as _;
use sha2::Sha256;

const SECRET_PREFIX: &str = "whsec_";
const SECRET_BYTES: usize = 32;

/// A new secret: `whsec_` and 32 random bytes in Base64.
pub(crate) fn new_secret() -> String {
    let mut bytes = [0; SECRET_BYTES];
    rand::rng().fill_bytes(&mut bytes);
    format!("{SECRET_PREFIX}{}", STANDARD.encode(bytes))
}

/// The header `webhook-signature`: `v1,` and the HMAC-SHA256 of `id.timestamp.body` in Base64, for
/// each of the secrets.
pub(super) fn header(secrets: &[String], id: &str, timestamp: i64, body: &str) -> String {
    let signatures: Vec<String> =
        secrets.iter().map(|secret| format!("v1,{}", sign(secret, id, timestamp, body))).collect();
    signatures.join(" ")
}

fn sign(secret: &str, id: &str, timestamp: i64, body: &str) -> String {
    let key = secret.strip_prefix(SECRET_PREFIX).and_then(|key| STANDARD.decode(key).ok());
    let key = key.unwrap_or_else(|| secret.as_bytes().to_vec());
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&key) else { return String::new() };
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    STANDARD.encode(mac.finalize().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specifications_own_example_is_signed_alike() {
        // From the Standard Webhooks specification and its libraries' tests.
        let header = header(
            &["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned()],
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            1_614_265_330,
            "{\"test\": 2432232314}",
        );
        assert_eq!(header, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn each_secret_signs_and_no_two_are_alike() {
        let secrets = [new_secret(), new_secret()];
        assert_ne!(secrets[0], secrets[1]);
        let header = header(&secrets, "evt_1", 1, "{}");
        let signatures: Vec<&str> = header.split(' ').collect();
        assert_eq!(signatures.len(), 2);
        assert_ne!(signatures[0], signatures[1]);
        for secret in secrets {
            let key = secret.strip_prefix("whsec_").expect("prefix");
            assert_eq!(STANDARD.decode(key).expect("Base64").len(), SECRET_BYTES);
        }
    }
}
