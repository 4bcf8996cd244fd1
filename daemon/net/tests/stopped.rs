//! A program of its own, since it stops itself.

use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use memlane_net::task;
use rustix::process::{Signal, getpid, kill_process};

/// The log of the program.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_process_that_was_stopped_has_not_stood_still() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
    let run = |work: fn()| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let task = async { task::spawn("the task", async move { work() }).await.unwrap() };
        runtime.block_on(tokio::task::LocalSet::new().run_until(task));
    };
    let said = || String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    run(|| {
        let (own, started) = (getpid(), Instant::now());
        let script = format!("sleep 1; kill -CONT {}", own.as_raw_nonzero());
        let mut waker = Command::new("sh").args(["-c", &script]).spawn().unwrap();
        kill_process(own, Signal::STOP).unwrap();
        waker.wait().unwrap();
        assert!(started.elapsed() > Duration::from_millis(900));
    });
    assert_eq!(said(), "");
    // The next poll is judged again.
    run(|| std::thread::sleep(Duration::from_millis(550)));
    assert!(said().contains("the control thread stood still"), "{}", said());
}
