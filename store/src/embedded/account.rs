//! The user that PostgreSQL runs as, which it refuses to be root.

use super::EmbeddedError;
use rustix::fs::{Gid, Uid};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// Users to run PostgreSQL as when this program is root, in the order of preference.
const CANDIDATES: [&str; 2] = ["postgres", "nobody"];

/// A user to become; or none, when this program is no more than a user itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Account {
    other: Option<(u32, u32)>,
}

impl Account {
    pub(super) fn choose() -> Result<Self, EmbeddedError> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Self { other: None });
        }
        let passwd = Path::new("/etc/passwd");
        let users = std::fs::read_to_string(passwd).map_err(EmbeddedError::file(passwd))?;
        find(&users).map(|ids| Self { other: Some(ids) }).ok_or(EmbeddedError::NoAccount)
    }

    /// Lets `command` run as this user.
    pub(super) fn apply(self, command: &mut Command) {
        if let Some((uid, gid)) = self.other {
            command.uid(uid).gid(gid);
        }
    }

    /// Gives `path` to this user.
    pub(super) fn own(self, path: &Path) -> Result<(), EmbeddedError> {
        let Some((uid, gid)) = self.other else { return Ok(()) };
        rustix::fs::chown(path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .map_err(|error| EmbeddedError::file(path)(error.into()))
    }
}

/// User and group id of the first candidate in the text of `/etc/passwd`.
fn find(passwd: &str) -> Option<(u32, u32)> {
    CANDIDATES.iter().find_map(|candidate| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(candidate)).then_some(())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some((uid, gid))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: &str = "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65533::/:/bin/false\n";

    #[test]
    fn postgres_is_preferred_and_nobody_stands_in() {
        assert_eq!(find(NOBODY), Some((65534, 65533)));
        let both = format!("{NOBODY}postgres:x:101:104:PostgreSQL:/var/lib/postgresql:/bin/bash\n");
        assert_eq!(find(&both), Some((101, 104)));
        assert_eq!(find("postgres-exporter:x:7:7::/:/bin/false\n"), None);
    }
}
