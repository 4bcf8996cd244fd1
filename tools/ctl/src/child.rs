//! Programs of the system that are asked something: without a shell, for a bounded time, with bounded output.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

/// So much of what a program prints is kept.
const MAX_OUTPUT_BYTES: u64 = 4 << 20;

/// What became of a program.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Whether it ended with exit code 0.
    pub(crate) success: bool,
    /// What it printed.
    pub(crate) stdout: String,
    /// What it complained of.
    pub(crate) stderr: String,
}

/// Runs a program to its end, and kills it if it takes longer than `limit`. It speaks English, and reads nothing.
///
/// # Errors
///
/// Fails if it cannot be started, or does not end in time.
pub(crate) fn run(command: &mut Command, limit: Duration) -> io::Result<Ended> {
    let deadline = Instant::now() + limit;
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let status = wait(&mut child, deadline)?;
    // A child of the program may hold its output open for longer than it lives itself.
    let text = |from: Receiver<Vec<u8>>| {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(100));
        String::from_utf8_lossy(&from.recv_timeout(left).unwrap_or_default()).into_owned()
    };
    Ok(Ended { success: status.success(), stdout: text(stdout), stderr: text(stderr) })
}

fn wait(child: &mut Child, deadline: Instant) -> io::Result<ExitStatus> {
    const LOOK: Duration = Duration::from_millis(5);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it did not end in time and was killed"));
        }
        thread::sleep(LOOK);
    }
}

/// Reads a stream to its end on a thread, so that the program never waits for room in a pipe.
fn collect(stream: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut kept = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.by_ref().take(MAX_OUTPUT_BYTES).read_to_end(&mut kept);
            let _ = sender.send(kept);
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> io::Result<Ended> {
        run(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn output_and_success_are_told() {
        let ended = shell("echo out; echo err >&2; exit 3", Duration::from_secs(60)).unwrap();
        assert_eq!((ended.success, ended.stdout.as_str(), ended.stderr.as_str()), (false, "out\n", "err\n"));
        assert!(shell("true", Duration::from_secs(60)).unwrap().success);
    }

    #[test]
    fn what_hangs_is_killed_and_what_is_absent_is_told() {
        let error = shell("exec sleep 600", Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let error = run(&mut Command::new("/nonexistent/program"), Duration::from_secs(1)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn more_than_is_kept_does_not_stop_a_program() {
        let ended = shell("head -c 5000000 /dev/zero", Duration::from_secs(60)).unwrap();
        assert_eq!((ended.success, ended.stdout.len() as u64), (true, MAX_OUTPUT_BYTES));
    }
}
