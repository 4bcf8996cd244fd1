//! The caller: the process at the other end of the API's socket, as the kernel identifies it.

use std::fmt;

use memlane_net::unix_socket::{Peer, groups_of_peer, peer};
use memlane_protocol::wire::plain;
use tokio::net::UnixStream;

/// The process that gives an order, for the log. It is shown as `memlanectl (uid 0, pid 4711)`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    /// The user of the process when it connected; `None` if the kernel does not say.
    pub uid: Option<u32>,
    /// The groups that the process was in when it connected.
    pub groups: Vec<u32>,
    /// The process that connected; `None` if it is in another PID namespace.
    pub pid: Option<u32>,
    /// The name of its program (`/proc/PID/comm`), after it was [looked up](Self::named). A process may change that name,
    /// so it proves nothing.
    pub program: Option<String>,
}

impl Caller {
    /// Identifies the process that made this connection (`SO_PEERCRED` and `SO_PEERGROUPS`, unix(7)).
    pub fn of(stream: &UnixStream) -> Self {
        let Ok(Peer { pid, uid }) = peer(stream) else { return Self::default() };
        let groups = groups_of_peer(stream).unwrap_or_default();
        Self { uid: Some(uid), groups, pid: (pid != 0).then_some(pid), program: None }
    }

    /// Looks up the name of the program, if it still runs.
    pub async fn named(mut self) -> Self {
        if let Some(pid) = self.pid {
            let read = move || std::fs::read_to_string(format!("/proc/{pid}/comm"));
            let name = tokio::task::spawn_blocking(read).await.ok().and_then(Result::ok);
            self.program = name.map(|name| plain(name.trim_end()).into_owned());
        }
        self
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |number: Option<u32>| number.map_or("unknown".to_owned(), |number| number.to_string());
        let (uid, pid) = (number(self.uid), number(self.pid));
        write!(f, "{} (uid {uid}, pid {pid})", self.program.as_deref().unwrap_or("a program"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_connects_is_known() {
        let (here, _there) = UnixStream::pair().unwrap();
        let caller = Caller::of(&here).named().await;
        let (uid, pid) = (rustix::process::getuid().as_raw(), std::process::id());
        assert_eq!((caller.uid, caller.pid), (Some(uid), Some(pid)));
        assert!(caller.groups.contains(&rustix::process::getegid().as_raw()));
        let name = std::fs::read_to_string("/proc/self/comm").unwrap();
        assert_eq!(caller.to_string(), format!("{} (uid {uid}, pid {pid})", name.trim_end()));
        assert_eq!(Caller::default().to_string(), "a program (uid unknown, pid unknown)");
    }
}
