//! Notifications for the service manager (`sd_notify(3)`). Without a service manager all functions do nothing.

use std::time::Duration;

use memlane_net::task;
use sd_notify::NotifyState;

/// Reports that the daemon serves. `systemctl status` shows `status`.
pub(crate) fn ready(status: &str) {
    notify(&[NotifyState::Ready, NotifyState::Status(&one_line(status))]);
}

/// Reports that the daemon ends.
pub(crate) fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Reports twice in each `WatchdogSec=` that the calling thread is alive, until it is dropped. Returns at once if the
/// unit has no watchdog.
pub(crate) async fn watchdog() {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut ticks = tokio::time::interval((limit / 2).max(Duration::from_millis(1)));
    loop {
        ticks.tick().await;
        // A busy service manager may not take the message at once.
        task::aside(|| notify(&[NotifyState::Watchdog])).await;
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!("cannot notify the service manager: {error}");
    }
}

/// Joins lines, because the service manager would read a second line as another assignment.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::process::Command;

    use super::*;

    /// The environment belongs to the whole process, so the part that reads it is run in one of its own.
    #[test]
    fn the_service_manager_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "systemd::tests::tells_its_manager", "--ignored"])
            .env("NOTIFY_SOCKET", &path)
            .env("WATCHDOG_USEC", "20000")
            .env_remove("WATCHDOG_PID")
            .output()
            .unwrap();
        assert!(child.status.success(), "{child:?}");
        let mut told = Vec::new();
        while told.last().is_none_or(|last| last != "STOPPING=1\n") {
            let mut buffer = [0; 256];
            let length = manager.recv(&mut buffer).unwrap();
            told.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
        }
        assert_eq!(told[..3], ["READY=1\nSTATUS=2 guests\n", "READY=1\nSTATUS=two lines\n", "WATCHDOG=1\n"]);
        assert!(told[3..told.len() - 1].iter().all(|message| message == "WATCHDOG=1\n"), "{told:?}");
    }

    #[test]
    #[ignore = "the part of the_service_manager_is_told that runs in a process of its own"]
    fn tells_its_manager() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        ready("2 guests");
        ready("two\nlines");
        let _ = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(15), watchdog()).await });
        stopping();
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        if std::env::var_os("NOTIFY_SOCKET").is_none() && std::env::var_os("WATCHDOG_USEC").is_none() {
            ready("alone");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(watchdog());
        }
    }
}
