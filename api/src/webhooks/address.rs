//! Where a webhook may go: to the internet, and inside the network only where the operator says so.
//!
//! A client names the URL and the server connects to it, so without this a client could reach what
//! only the server can: its database, a cloud's metadata service, a neighbour's machine.

use crate::failure::invalid_value;
use ipnet::IpNet;
use std::net::{IpAddr, SocketAddr};
use tunesmith_core::errors::ApiError;
use url::{Host, Url};

const MAX_URL: usize = 2048;

/// Ranges that are not the internet: IANA's special-purpose addresses of IPv4 (RFC 6890 and its
/// successors), multicast and what is reserved.
const NOT_PUBLIC_V4: [&str; 15] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
];
/// The internet of IPv6.
const PUBLIC_V6: &str = "2000::/3";
/// Ranges in it that are special all the same; some of them (Teredo, 6to4) wrap IPv4 addresses.
const NOT_PUBLIC_V6: [&str; 4] = ["2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"];

/// Which addresses webhooks may be sent to.
#[derive(Debug, Clone, Default)]
pub(crate) struct AddressPolicy {
    /// Inside the network; `http` is taken there too.
    allowed: Vec<IpNet>,
}

/// Why a URL leads nowhere that it may.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Forbidden {
    #[error("the URL is not one that can be called")]
    Url,
    #[error("{host} cannot be resolved: {source}")]
    Unresolved { host: String, source: std::io::Error },
    #[error("{host} has no address")]
    NoAddress { host: String },
    #[error("{host} leads to {address}, which is not on the internet, or not allowed by http")]
    Address { host: String, address: IpAddr },
}

impl AddressPolicy {
    /// The internet, and `allowed`.
    pub(crate) fn new(allowed: Vec<IpNet>) -> Self {
        Self { allowed }
    }

    /// Checks a URL as far as it can be before its name is resolved.
    ///
    /// # Errors
    /// `invalid_value` for the parameter `url`.
    pub(crate) fn check(&self, text: &str) -> Result<Url, ApiError> {
        let wrong = |rule: &str| invalid_value("url", text, rule);
        let url = Url::parse(text).map_err(|_| wrong("a URL such as https://example.com/hook"))?;
        let http_is_taken = !self.allowed.is_empty();
        match url.scheme() {
            "https" => {}
            "http" if http_is_taken => {}
            _ => return Err(wrong("an https:// URL")),
        }
        if !url.username().is_empty() || url.password().is_some() || text.len() > MAX_URL {
            let rule = format!("a URL without a password, of at most {MAX_URL} characters");
            return Err(invalid_value("url", "the URL", &rule));
        }
        let address = match url.host() {
            None => return Err(wrong("a URL with a host")),
            Some(Host::Domain(_)) => return Ok(url),
            Some(Host::Ipv4(address)) => IpAddr::V4(address),
            Some(Host::Ipv6(address)) => IpAddr::V6(address),
        };
        if self.permits(address, url.scheme()) {
            Ok(url)
        } else {
            Err(wrong("an address on the internet, or one that this server's operator allows"))
        }
    }

    /// The addresses behind a URL, every one of which may be connected to.
    ///
    /// # Errors
    /// What is wrong with the URL or with an address.
    pub(crate) async fn resolve(&self, url: &Url) -> Result<Vec<SocketAddr>, Forbidden> {
        let port = url.port_or_known_default().ok_or(Forbidden::Url)?;
        let addresses: Vec<SocketAddr> = match url.host().ok_or(Forbidden::Url)? {
            Host::Ipv4(address) => vec![SocketAddr::new(address.into(), port)],
            Host::Ipv6(address) => vec![SocketAddr::new(address.into(), port)],
            Host::Domain(host) => tokio::net::lookup_host((host, port))
                .await
                .map_err(|source| Forbidden::Unresolved { host: host.to_owned(), source })?
                .collect(),
        };
        let host = || url.host_str().unwrap_or_default().to_owned();
        if addresses.is_empty() {
            return Err(Forbidden::NoAddress { host: host() });
        }
        // One forbidden address is enough: a name that leads both ways is up to something.
        match addresses.iter().find(|address| !self.permits(address.ip(), url.scheme())) {
            None => Ok(addresses),
            Some(address) => Err(Forbidden::Address { host: host(), address: address.ip() }),
        }
    }

    fn permits(&self, address: IpAddr, scheme: &str) -> bool {
        let address = unmapped(address);
        self.allowed.iter().any(|range| range.contains(&address))
            || (scheme == "https" && is_public(address))
    }
}

/// An IPv4 address in IPv6's clothes is the IPv4 address that will be reached.
fn unmapped(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(address, IpAddr::V4),
        v4 => v4,
    }
}

fn is_public(address: IpAddr) -> bool {
    let is_in = |range: &str| range.parse::<IpNet>().is_ok_and(|range| range.contains(&address));
    match address {
        IpAddr::V4(_) => !NOT_PUBLIC_V4.into_iter().any(is_in),
        IpAddr::V6(_) => is_in(PUBLIC_V6) && !NOT_PUBLIC_V6.into_iter().any(is_in),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(ranges: &[&str]) -> AddressPolicy {
        AddressPolicy::new(ranges.iter().map(|range| range.parse().expect("a range")).collect())
    }

    #[test]
    fn only_the_internet_is_public() {
        for address in [
            "127.0.0.1",
            "10.1.2.3",
            "172.31.255.255",
            "192.168.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a00:1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2001:0:7f00:1::",
            "::127.0.0.1",
        ] {
            let address = address.parse().expect("an address");
            assert!(!policy(&[]).permits(address, "https"), "{address}");
        }
        for address in
            ["1.1.1.1", "172.32.0.1", "9.255.255.255", "2606:4700::1111", "::ffff:8.8.8.8"]
        {
            let address = address.parse().expect("an address");
            assert!(policy(&[]).permits(address, "https"), "{address}");
            assert!(!policy(&[]).permits(address, "http"), "{address}");
        }
    }

    #[test]
    fn what_the_operator_allows_is_permitted_and_no_more() {
        let policy = policy(&["10.1.0.0/16", "fd00::/8"]);
        for (address, permitted) in
            [("10.1.2.3", true), ("::ffff:10.1.2.3", true), ("10.2.0.1", false), ("fd00::1", true)]
        {
            let address = address.parse().expect("an address");
            for scheme in ["http", "https"] {
                assert_eq!(policy.permits(address, scheme), permitted, "{address}");
            }
        }
    }

    #[test]
    fn a_url_is_refused_before_anything_is_sent() {
        let strict = policy(&[]);
        for text in [
            "no url",
            "ftp://example.com/",
            "http://example.com/",
            "https://127.0.0.1/",
            // Other ways to write 127.0.0.1.
            "https://2130706433/",
            "https://0x7f.1/",
            "https://[::1]/",
            "https://[::ffff:7f00:1]/",
            "https://169.254.169.254/latest/meta-data",
            "https://user:secret@example.com/",
            "https://",
            "file:///etc/passwd",
        ] {
            let refused = strict.check(text).expect_err(text);
            assert_eq!(refused.param.as_deref(), Some("url"), "{text}");
        }
        assert!(strict.check("https://example.com:8443/hook?x=1").is_ok());
        let open = policy(&["127.0.0.0/8"]);
        assert!(open.check("http://127.0.0.1:9/").is_ok());
        assert!(open.check("https://10.0.0.1/").is_err());
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_refused_when_it_is_resolved() {
        let url = Url::parse("https://localhost/").expect("a URL");
        let refused = policy(&[]).resolve(&url).await.expect_err("inside");
        assert!(matches!(refused, Forbidden::Address { .. }), "{refused}");
        let allowed = policy(&["127.0.0.0/8", "::1/128"]).resolve(&url).await.expect("allowed");
        assert!(allowed.iter().all(|address| address.port() == 443 && address.ip().is_loopback()));
    }
}
