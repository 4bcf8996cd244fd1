//! A host that is reached over ssh.
//!
//! One connection per host: it carries a copy of the harness's program there, which is run as the
//! [`agent`](crate::agent), and everything else shares it (`ControlMaster`). Sockets of the host's programs are reached through it as well.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cleanup::Registration;
use crate::clock::unix_time;
use crate::wait::wait_for;

/// The longest wait for ssh to share its connection.
const SHARED: Duration = Duration::from_secs(10);

/// The longest answer that is read, in bytes.
const LONGEST_ANSWER: u64 = 16 << 20;
/// The number of times that a clock is read. The quickest answer counts.
const CLOCK_ASKED: u32 = 8;

/// The script that receives the agent and runs it. It removes the directories in any case.
const BOOTSTRAP: &str = r#"set -eu; d=$(mktemp -d /tmp/memlane-XXXXXX); trap 'rm -rf "$d" "/dev/shm/${d##*/}"' EXIT; trap 'exit 1' HUP INT TERM;
    echo "$d"; head -c SIZE > "$d/agent"; chmod 700 "$d/agent"; "$d/agent" agent "$d""#;

/// A host that is reached over ssh, and an agent that runs there. Dropping this ends the agent and removes its
/// directories.
#[derive(Debug)]
pub struct Remote {
    target: String,
    /// The command `ssh` with its options.
    ssh: Vec<OsString>,
    /// The directory in which this process keeps its ends of the connection and of the host's sockets.
    local: PathBuf,
    directory: PathBuf,
    memory: PathBuf,
    /// The address by which it was reached.
    address: Option<String>,
    pipes: Mutex<Pipes>,
    _cleanup: Registration,
}

#[derive(Debug)]
struct Pipes {
    /// The agent's input. Only the end of the connection takes it away.
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    child: Child,
}

impl Remote {
    /// Connects to `target` with the command `ssh`, and starts `agent` there. Files on this machine that belong to the
    /// connection are kept in `local`, a directory that exists and has a short path.
    ///
    /// # Errors
    ///
    /// If ssh fails; it says why on stderr.
    pub(crate) fn connect(ssh: &[OsString], target: &str, agent: &Path, local: &Path) -> Result<Self> {
        ensure!(!target.is_empty() && !target.starts_with('-'), "{target:?} is no name of a host");
        let (program, options) = ssh.split_first().context("there is no ssh command")?;
        let mut ssh = vec![program.clone()];
        ssh.extend(options.iter().cloned());
        ssh.extend(["-o", "BatchMode=yes", "-o", "ServerAliveInterval=15", "-o"].map(OsString::from));
        ssh.push(format!("ControlPath={}", local.join("ssh").display()).into());
        let mut file = File::open(agent).with_context(|| format!("opening {}", agent.display()))?;
        let script = BOOTSTRAP.replace("SIZE", &file.metadata()?.len().to_string());

        let mut command = of(&ssh);
        command.args(["-o", "ControlMaster=yes", "-o", "ControlPersist=no", target, &script]);
        // A group of its own: Ctrl-C shall reach the harness, which then ends the connection in its own order.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("running {}", program.display()))?;
        let mut orders = child.stdin.take().expect("it is piped");
        let mut answers = BufReader::new(child.stdout.take().expect("it is piped"));
        let cleanup = Registration::new({
            // The agent ends with its input, and with the agent the connection.
            let ssh = ssh.clone();
            let target = target.to_owned();
            move || {
                let _ = of(&ssh).args(["-O", "exit", &target]).stderr(Stdio::null()).status();
            }
        });
        let connected = || format!("connecting to {target} with ssh; what it says is above");
        let mut directory = String::new();
        answers.read_line(&mut directory).with_context(connected)?;
        let directory = PathBuf::from(directory.trim_end());
        ensure!(directory.is_absolute(), connected());
        std::io::copy(&mut file, &mut orders).with_context(connected)?;
        let mut remote = Self {
            target: target.to_owned(),
            ssh,
            local: local.to_owned(),
            directory,
            memory: PathBuf::new(),
            address: None,
            pipes: Mutex::new(Pipes { orders: Some(orders), answers, child }),
            _cleanup: cleanup,
        };
        let hello = remote.answer().with_context(|| format!("starting the harness's agent on {target}"))?;
        remote.memory = hello["memory"].as_str().context("an agent without memory")?.into();
        remote.address = hello["address"].as_str().map(str::to_owned);
        wait_for("ssh to share its connection", SHARED, || local.join("ssh").exists().then_some(()))?;
        Ok(remote)
    }

    /// Returns the name of the host, as ssh knows it.
    pub(crate) fn target(&self) -> &str {
        &self.target
    }

    /// Returns the directory of the harness on that host. It is removed when the agent ends.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the directory of the harness on tmpfs on that host. It is removed when the agent ends.
    pub(crate) fn memory_directory(&self) -> &Path {
        &self.memory
    }

    /// Measures how far the host's clock is ahead of the clock of this machine, in seconds. The error is half a round
    /// trip at most.
    ///
    /// # Errors
    ///
    /// As [`Remote::ask`].
    pub(crate) fn clock_ahead(&self) -> Result<f64> {
        let mut best = (f64::INFINITY, 0.0);
        for _ in 0..CLOCK_ASKED {
            let before = unix_time();
            let there = self.ask("time", json!({}))?.as_f64().context("an agent that tells no time")?;
            let after = unix_time();
            if after - before < best.0 {
                best = (after - before, there - f64::midpoint(before, after));
            }
        }
        Ok(best.1)
    }

    /// Returns the address by which the host was reached.
    pub(crate) fn address(&self) -> Option<&str> {
        self.address.as_deref()
    }

    /// Sends the agent an order with its values, and waits for the answer.
    ///
    /// # Errors
    ///
    /// If it fails there, or the connection is lost.
    pub fn ask(&self, what: &str, mut order: Value) -> Result<Value> {
        order["do"] = Value::from(what);
        let mut pipes = self.pipes.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = pipes.order(&order).and_then(|()| pipes.answer());
        asked.with_context(|| format!("asking {} for {what}", self.target))
    }

    /// Reads a file on that host.
    ///
    /// # Errors
    ///
    /// As [`Remote::ask`].
    pub(crate) fn read(&self, path: &str) -> Result<String> {
        let text = self.ask("read", json!({ "path": path }))?;
        Ok(text.as_str().context("an agent that reads no text")?.to_owned())
    }

    /// Copies a program or a library to that host.
    ///
    /// # Errors
    ///
    /// If there is no such file, or no room for it.
    pub(crate) fn copy(&self, file: &Path) -> Result<()> {
        let failed = || format!("copying {} to {}", file.display(), self.target);
        let name = file.file_name().and_then(|name| name.to_str()).with_context(failed)?;
        let there = self.directory.join(name);
        let script = format!("cat > '{0}' && chmod 700 '{0}'", there.display());
        let input = File::open(file).with_context(failed)?;
        let status =
            of(&self.ssh).args([&self.target, &script]).stdin(input).status().with_context(failed)?;
        ensure!(status.success(), failed());
        Ok(())
    }

    /// Returns a socket on this machine that leads to the socket of that name in the host's directory.
    ///
    /// # Errors
    ///
    /// If ssh refuses.
    pub(crate) fn forward(&self, name: &str) -> Result<PathBuf> {
        let here = self.local.join(name);
        if here.exists() {
            return Ok(here);
        }
        let both = format!("{}:{}", here.display(), self.directory.join(name).display());
        let output = of(&self.ssh).args(["-O", "forward", "-L", &both, &self.target]).output()?;
        if !output.status.success() {
            bail!(
                "{} does not let its sockets be reached (AllowStreamLocalForwarding of sshd_config): {}",
                self.target,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(here)
    }

    fn answer(&mut self) -> Result<Value> {
        self.pipes.get_mut().unwrap_or_else(PoisonError::into_inner).answer()
    }
}

impl Pipes {
    fn order(&mut self, order: &Value) -> Result<()> {
        let orders = self.orders.as_mut().expect("only dropping takes it");
        writeln!(orders, "{order}").context("the connection is lost")
    }

    fn answer(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.answers.by_ref().take(LONGEST_ANSWER).read_line(&mut line)?;
        ensure!(read > 0 && line.ends_with('\n'), "the connection is lost");
        let mut answer: Value = serde_json::from_str(&line).context("its answer is no JSON")?;
        match answer["error"].as_str() {
            Some(error) => bail!("{error}"),
            None => Ok(answer["ok"].take()),
        }
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // The agent ends when there can be no more orders, and cleans up before.
        self.orders = None;
        // Whoever drops it does not want to know.
        let _ = self.child.wait();
    }
}

/// Makes a command out of its words.
fn of(words: &[OsString]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// A process that an agent has started.
#[derive(Debug)]
pub(crate) struct RemoteProcess {
    pub(crate) host: Arc<Remote>,
    pub(crate) pid: u32,
}

impl RemoteProcess {
    /// Returns the exit status, if the process has ended.
    pub(crate) fn status(&self) -> Result<Option<ExitStatus>> {
        let status = self.host.ask("status", json!({ "pid": self.pid }))?;
        let raw = status.as_i64().and_then(|raw| i32::try_from(raw).ok());
        Ok(raw.map(ExitStatus::from_raw))
    }

    pub(crate) fn signal(&self, signal: &str) -> Result<()> {
        self.host.ask("signal", json!({ "pid": self.pid, "signal": signal })).map(drop)
    }

    /// Returns the end of what the process has printed.
    pub(crate) fn log_tail(&self, name: &str) -> Result<String> {
        let tail = self.host.ask("log", json!({ "name": name }))?;
        Ok(tail.as_str().unwrap_or_default().to_owned())
    }
}
