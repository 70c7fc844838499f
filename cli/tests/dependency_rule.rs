//! Dependencies run one way: `core ← store ← api, worker ← sampler`, `core ← engine`, and the program wires
//! them. So the API builds without burn, and a trainer carries neither SQL nor HTTP.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// The workspace's graph of normal dependencies, as cargo resolved it.
struct Graph {
    names: BTreeMap<String, String>,
    edges: BTreeMap<String, Vec<String>>,
    /// Each member's name and all that its manifest asks for, tests and build scripts included.
    members: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn read() -> Self {
        // For this machine alone: what other platforms need may not have been downloaded.
        let output = Command::new(env!("CARGO"))
            .args(["metadata", "--offline", "--locked", "--format-version", "1"])
            .args(["--filter-platform", &host()])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("metadata");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let list = |value: &Value| value.as_array().expect("list").clone();

        let packages = list(&metadata["packages"]);
        let names = packages.iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
        let ids: BTreeSet<_> = list(&metadata["workspace_members"]).iter().map(text).collect();
        let members = packages
            .iter()
            .filter(|package| ids.contains(package["id"].as_str().expect("id")))
            .map(|package| {
                let asked =
                    list(&package["dependencies"]).iter().map(|d| text(&d["name"])).collect();
                (text(&package["name"]), asked)
            })
            .collect();
        let edges = list(&metadata["resolve"]["nodes"])
            .iter()
            .map(|node| {
                let normal =
                    |dep: &&Value| list(&dep["dep_kinds"]).iter().any(|k| k["kind"].is_null());
                let deps = list(&node["deps"]);
                (text(&node["id"]), deps.iter().filter(normal).map(|d| text(&d["pkg"])).collect())
            })
            .collect();
        Self { names, edges, members }
    }

    /// Names of everything that `member` is built from.
    fn reached_from(&self, member: &str) -> BTreeSet<&str> {
        let is_ours = |id: &&String| self.names[*id] == member && id.contains("path+file");
        let start = self.names.keys().find(is_ours).expect("a member of the workspace");
        let mut seen = BTreeSet::from([start.as_str()]);
        let mut open = vec![start.as_str()];
        while let Some(id) = open.pop() {
            for next in &self.edges[id] {
                if seen.insert(next) {
                    open.push(next);
                }
            }
        }
        seen.into_iter().map(|id| self.names[id].as_str()).collect()
    }
}

/// The platform that this compiler builds for.
fn host() -> String {
    let output = Command::new("rustc").arg("-vV").output().expect("rustc runs");
    let text = String::from_utf8(output.stdout).expect("text");
    text.lines().find_map(|line| line.strip_prefix("host: ")).expect("a host").to_owned()
}

fn is_burn(name: &str) -> bool {
    name == "burn" || name.starts_with("burn-") || name.starts_with("candle")
}

fn is_sql(name: &str) -> bool {
    name == "sqlx" || name.starts_with("sqlx-")
}

fn is_network(name: &str) -> bool {
    ["actix-web", "hyper", "object_store", "reqwest", "tokio", "ureq"].contains(&name)
}

fn offenders<'a>(graph: &'a Graph, member: &str, forbidden: impl Fn(&str) -> bool) -> Vec<&'a str> {
    graph.reached_from(member).into_iter().filter(|name| forbidden(name)).collect()
}

#[test]
fn burn_reaches_the_engine_and_the_program_only() {
    let graph = Graph::read();
    for member in ["core", "store", "api", "worker", "sampler"] {
        let member = &format!("tunesmith-{member}");
        assert_eq!(offenders(&graph, member, is_burn), Vec::<&str>::new(), "in {member}");
    }
    // The walk sees what is there.
    for member in ["tunesmith-engine", "tunesmith"] {
        assert!(offenders(&graph, member, is_burn).contains(&"burn"), "{member}");
    }
}

#[test]
fn neither_sql_nor_http_reaches_the_engine_or_core() {
    let graph = Graph::read();
    for member in ["tunesmith-engine", "tunesmith-core"] {
        let found = offenders(&graph, member, |name| is_sql(name) || is_network(name));
        assert_eq!(found, Vec::<&str>::new(), "in {member}");
    }
    assert!(offenders(&graph, "tunesmith-api", is_sql).contains(&"sqlx"));
}

#[test]
fn only_the_store_asks_for_sqlx_and_object_store() {
    let graph = Graph::read();
    for (member, asked) in &graph.members {
        let storage = asked.iter().any(|name| is_sql(name) || name == "object_store");
        assert_eq!(storage, member == "tunesmith-store", "{member}");
    }
}

#[test]
fn only_the_engine_asks_for_burn() {
    let graph = Graph::read();
    for (member, asked) in &graph.members {
        let trains = asked.iter().any(|name| is_burn(name));
        assert_eq!(trains, member == "tunesmith-engine", "{member}");
    }
}

#[test]
fn core_asks_for_no_other_member_and_members_below_the_program_not_for_each_other() {
    let graph = Graph::read();
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("tunesmith-core", &[][..]),
        ("tunesmith-store", &["tunesmith-core"]),
        ("tunesmith-engine", &["tunesmith-core"]),
        ("tunesmith-api", &["tunesmith-core", "tunesmith-store"]),
        ("tunesmith-worker", &["tunesmith-core", "tunesmith-store"]),
        ("tunesmith-sampler", &["tunesmith-core", "tunesmith-store", "tunesmith-worker"]),
    ]);
    for (member, allowed) in allowed {
        let ours: Vec<_> = graph.members[member]
            .iter()
            .map(String::as_str)
            .filter(|name| graph.members.contains_key(*name) && *name != member)
            .collect();
        assert_eq!(ours, allowed, "{member}");
    }
}

#[test]
fn tls_is_rustls_with_ring_and_needs_no_c_library() {
    let graph = Graph::read();
    let reached = graph.reached_from("tunesmith");
    for name in ["aws-lc-sys", "native-tls"] {
        assert!(!reached.contains(name), "{name}");
    }
    assert!(reached.contains("ring"));
}
