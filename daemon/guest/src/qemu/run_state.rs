//! The run state of a guest is what QEMU calls it (`RunState` in its QAPI schema): `running`, `paused` and so on. A move does
//! not change it.

/// From this version on, QEMU keeps a suspended guest (S3) suspended when it is migrated. Before, it woke it up.
const KEEPS_SUSPENDED: [u32; 3] = [9, 0, 0];

/// In these states a guest stands still for reasons of its own, or of its operator's, and can be moved.
const STANDING: [&str; 8] = [
    "paused",
    "suspended",
    "shutdown",
    "guest-panicked",
    "io-error",
    "internal-error",
    "watchdog",
    "prelaunch",
];

/// A guest cannot be moved in its state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Immovable {
    /// QEMU would wake it up.
    #[error(
        "the guest is suspended (S3), and this QEMU would wake it up by moving it; QEMU 9.0 and newer would not"
    )]
    Suspended,
    /// A migration that came to nothing has left QEMU so.
    #[error(
        "QEMU has migrated the guest by itself, or has tried to while it stood still, and migrates it no more: its status is postmigrate"
    )]
    Migrated,
    /// Nobody knows what would come of it.
    #[error("the guest neither runs nor stands still; its status is {0}")]
    Other(String),
}

impl Immovable {
    /// Returns what an operator can do about it.
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::Suspended => "wake it up (system_wakeup), or start it in a newer QEMU",
            Self::Migrated => {
                "if it does not run elsewhere, let it run by QEMU's `cont`, and order the move again"
            }
            Self::Other(_) => "wait until that has passed, and order the move again",
        }
    }
}

/// Checks that a guest in this state can be moved by this version of QEMU.
///
/// # Errors
///
/// Fails if it would not arrive in that state.
pub(super) fn movable(status: &str, version: [u32; 3]) -> Result<(), Immovable> {
    match status {
        "running" => Ok(()),
        "suspended" if version < KEEPS_SUSPENDED => Err(Immovable::Suspended),
        status if STANDING.contains(&status) => Ok(()),
        "postmigrate" => Err(Immovable::Migrated),
        other => Err(Immovable::Other(other.to_owned())),
    }
}

/// Finds the state that the guest had before QEMU paused it, in what QEMU has written of its devices. Returns `None` if it
/// ran.
///
/// Among the sections there is one named `globalstate`: the length of a text, and the text in 100 bytes. It is the only
/// place that nothing can have changed meanwhile: what QEMU says of its status can, before it pauses the guest.
pub(super) fn standing_in(stream: &[u8]) -> Option<String> {
    /// The length of the name, the name, the number of the instance (0), and the version (1).
    const SECTION: &[u8] = b"\x0bglobalstate\0\0\0\0\0\0\0\x01";
    const TEXT_BYTES: usize = 100;
    // It is among the last: what a guest has written into memory that is part of the stream comes before it.
    let start = stream.windows(SECTION.len()).rposition(|window| window == SECTION)? + SECTION.len();
    let text = stream.get(start + size_of::<u32>()..)?.get(..TEXT_BYTES)?;
    let end = text.iter().position(|byte| *byte == 0)?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    let is_state = word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    (is_state && !word.is_empty() && word != "running").then(|| word.to_owned())
}

/// Tells whether `cont` has a guest in its state that stood still before: vCPUs of one that is suspended stay so.
pub(super) fn continues_standing(state: &str, version: [u32; 3]) -> bool {
    state == "suspended" && version >= KEEPS_SUSPENDED
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(state: &str) -> Vec<u8> {
        let mut text = [0; 100];
        text[..state.len()].copy_from_slice(state.as_bytes());
        let size = (state.len() as u32 + 1).to_be_bytes();
        [b"QEVM\x04\0\0\0'\x0bglobalstate\0\0\0\0\0\0\0\x01", &size[..], &text, b"\x04\0\0\0(\x06other"]
            .concat()
    }

    #[test]
    fn the_state_is_found_in_the_stream() {
        assert_eq!(standing_in(&stream("running")), None);
        for state in ["paused", "guest-panicked", "shutdown"] {
            assert_eq!(standing_in(&stream(state)).as_deref(), Some(state));
            // The guest's own memory comes before, whatever it holds.
            let both = [stream("running"), stream(state)].concat();
            assert_eq!(standing_in(&both).as_deref(), Some(state));
        }
    }

    #[test]
    fn what_is_no_state_is_none() {
        let whole = stream("paused");
        for length in 0..whole.len() - 10 {
            let cut = standing_in(&whole[..length]);
            assert!(cut.is_none() || cut.as_deref() == Some("paused"), "{length} bytes");
        }
        for text in ["", "PAUSED", "pau sed"] {
            assert_eq!(standing_in(&stream(text)), None, "{text}");
        }
    }

    #[test]
    fn only_some_states_can_be_moved() {
        for state in ["running", "paused", "shutdown", "io-error"] {
            assert_eq!(movable(state, [7, 2, 0]), Ok(()));
        }
        assert_eq!(movable("suspended", [8, 2, 9]), Err(Immovable::Suspended));
        assert_eq!(movable("suspended", [9, 0, 0]), Ok(()));
        for state in ["postmigrate", "save-vm", "inmigrate", "debug", "finish-migrate"] {
            assert!(movable(state, [10, 0, 0]).is_err(), "{state}");
        }
    }
}
