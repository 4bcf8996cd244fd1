//! The log of a daemon, and what reads it.

mod common;

use std::fs::File;
use std::io::{Read, Write};

use common::{LONG, Stage};
use memlane_lab::{HostId, LabOptions, LabProcess, wait_for};
use rustix::fs::{Mode, OFlags};

/// A pipe with a name, which is full from the start.
struct FullPipe {
    end: File,
    /// Starts what follows with the pipe as its standard error stream.
    script: String,
}

impl FullPipe {
    fn new(stage: &Stage) -> Self {
        let path = stage.rig.lab().host(HostId::A).directory().join("log.fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        let flags = OFlags::RDWR | OFlags::NONBLOCK;
        let mut end = File::from(rustix::fs::open(&path, flags, Mode::empty()).unwrap());
        while end.write(&[b'\n'; 512]).is_ok() {}
        Self { end, script: format!(r#"exec "$@" 2<>{}"#, path.display()) }
    }

    /// Reads all that is written until `text` is among it.
    fn read_until(&mut self, text: &str) -> String {
        let mut all = Vec::new();
        let found = wait_for("a line in the log", LONG, || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = self.end.read(&mut piece) {
                all.extend_from_slice(&piece[..length]);
            }
            String::from_utf8_lossy(&all).contains(text).then_some(())
        });
        let all = String::from_utf8(all).unwrap();
        found.unwrap_or_else(|error| panic!("{error}: {text:?} is not in {all}"));
        all
    }
}

/// A journal that hangs, for example. Guests move nevertheless, and when the log is read at last, it tells all.
#[test]
fn a_log_that_nobody_reads_holds_up_nothing() {
    let test = "a_log_that_nobody_reads_holds_up_nothing";
    let Some(mut stage) = Stage::new(test, LabOptions::default()) else { return };
    let mut pipe = FullPipe::new(&stage);
    let mut daemon = start_with(&mut stage, &pipe);
    let mut guest = stage.guest("web1");
    let mut there = stage.receiver("web1");
    stage.assert_runs_on("web1", &mut guest);
    stage.assert_moves("web1", &mut there);
    assert!(daemon.is_running());
    let log = pipe.read_until("completed");
    assert!(log.contains("ready"), "{log}");
}

/// Starts the daemon of host A in place of the rig's, with the pipe for its log.
fn start_with(stage: &mut Stage, pipe: &FullPipe) -> LabProcess {
    stage.rig.stop_daemon(HostId::A).unwrap();
    let host = stage.rig.lab().host(HostId::A);
    let mut command = host.command("sh");
    command.args(["-c", &pipe.script, "sh", env!("CARGO_BIN_EXE_memlaned"), "--config"]);
    command.arg(stage.rig.config_file(HostId::A));
    host.spawn("memlaned-piped", command).unwrap()
}
