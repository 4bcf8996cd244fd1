//! The user that a daemon runs as: root, or the one of its systemd unit.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::host::LabHost;

/// The unit that Memlane ships for systemd.
const UNIT: &str = include_str!("../../../systemd/memlaned.service");
/// The number of the unit's user in a lab, which need not be a user of the machine.
const UID: u32 = 64_055;

/// The user that the daemons run as.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DaemonUser {
    /// Root, who may do everything.
    #[default]
    Root,
    /// A user of its own with the capabilities that `systemd/memlaned.service` gives, and no others. VMMs still run as
    /// root, because that user may not open /dev/kvm: the daemon sees them as another user's processes.
    Unit,
    /// The same user as [`DaemonUser::Unit`], but without this capability, such as `CAP_KILL`.
    UnitWithout(&'static str),
}

impl DaemonUser {
    /// Gives the user its directories on a host.
    pub(crate) fn settle(&self, host: &LabHost) -> Result<()> {
        if *self == Self::Root {
            return Ok(());
        }
        ensure!(!host.is_remote(), "daemons on hosts reached over ssh run as the user who logs in there");
        [host.directory(), host.memory_directory()]
            .iter()
            .try_for_each(|directory| self.give(host, directory))
    }

    /// Gives a file or a directory of a host to the user.
    pub(crate) fn give(&self, host: &LabHost, path: &Path) -> Result<()> {
        if *self == Self::Root || host.is_remote() {
            return Ok(());
        }
        std::os::unix::fs::chown(path, Some(UID), Some(UID))
            .with_context(|| format!("giving {} to the daemon's user", path.display()))
    }

    /// Returns the words of a command that runs `program` as this user.
    pub(crate) fn words(&self, program: &Path) -> Vec<OsString> {
        let Some(capabilities) = self.capabilities() else { return vec![program.into()] };
        let each = |sign: char| capabilities.iter().map(move |name| format!("{sign}{name}"));
        let listed = each('+').collect::<Vec<_>>().join(",");
        let mut words =
            vec!["setpriv".into(), format!("--reuid={UID}").into(), format!("--regid={UID}").into()];
        // Becoming somebody else has the kernel forget with whom to die.
        words.extend(["--clear-groups", "--no-new-privs", "--pdeathsig=KILL"].map(OsString::from));
        for set in ["--inh-caps", "--ambient-caps", "--bounding-set"] {
            words.push(format!("{set}=-all,{listed}").into());
        }
        words.push(program.into());
        words
    }

    /// Returns the names of the user's capabilities, as setpriv(1) writes them; `None` for all of them.
    fn capabilities(&self) -> Option<Vec<String>> {
        let without = match self {
            Self::Root => return None,
            Self::Unit => None,
            Self::UnitWithout(capability) => Some(*capability),
        };
        let given = UNIT.lines().find_map(|line| line.strip_prefix("AmbientCapabilities="));
        let given = given.unwrap_or_default().split_whitespace();
        let kept = given.filter(|name| Some(*name) != without);
        Some(kept.map(|name| name.trim_start_matches("CAP_").to_lowercase()).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::{Requirement, skip};

    /// The worst exposure that systemd-analyze(1) may find in the unit, of 0 to 100.
    const EXPOSURE: u32 = 25;

    #[test]
    fn the_unit_is_confined() {
        if skip("the_unit_is_confined", &[Requirement::SystemdAnalyze]) {
            return;
        }
        let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../../systemd/memlaned.service");
        let mut analyze = Command::new("systemd-analyze");
        analyze.args(["security", "--offline=true", &format!("--threshold={EXPOSURE}"), unit]);
        let output = analyze.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
    }

    #[test]
    fn the_unit_says_what_its_user_may_do() {
        assert_eq!(DaemonUser::Root.words(Path::new("/bin/memlaned")), ["/bin/memlaned"]);
        let bounding = UNIT.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let ambient = UNIT.lines().find_map(|line| line.strip_prefix("AmbientCapabilities="));
        assert_eq!(ambient, bounding, "what is not in both sets is not had");
        let capabilities = DaemonUser::Unit.capabilities().expect("some");
        assert!(capabilities.contains(&"net_raw".to_owned()), "{capabilities:?}");
        let without = DaemonUser::UnitWithout("CAP_NET_RAW").capabilities().expect("some");
        assert!(!without.contains(&"net_raw".to_owned()), "{without:?}");
    }
}
