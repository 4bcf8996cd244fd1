//! This is the harness's other half on a host that is reached over ssh. It starts programs there, reads and writes
//! files, and carries out further orders: one line of JSON for each order and one for each answer.
//!
//! It ends when its input does, which is when the harness that gives the orders has ended for any reason. Then all that it has
//! started ends too, and its directory goes.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::child::{die_with_parent, tail};
use crate::clock::unix_time;
use crate::namespace::MEMORY;

/// The longest order that is listened to, in bytes.
const LONGEST_ORDER: u64 = 1 << 20;

struct Agent {
    directory: PathBuf,
    /// The agent's directory on tmpfs, for guests' memory.
    memory: PathBuf,
    started: BTreeMap<u32, Child>,
}

/// Carries out orders until there are no more. An order that this file does not know is passed to `more` with its name
/// and its values; `more` returns `None` if it does not know the order either.
///
/// # Errors
///
/// If orders cannot be read or answered; not if one fails, which is its answer.
pub fn serve(
    directory: &Path,
    mut orders: impl BufRead,
    mut answers: impl Write,
    more: &mut dyn FnMut(&str, &Value) -> Option<Result<Value>>,
) -> Result<()> {
    let name = directory.file_name().context("the agent's directory has no name")?;
    let memory = Path::new(MEMORY).join(name);
    // What guests hold is nobody else's to read.
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&memory)
        .with_context(|| format!("creating {}", memory.display()))?;
    let mut agent = Agent { directory: directory.to_owned(), memory, started: BTreeMap::new() };
    let mut answer = |answer: Value| -> Result<()> {
        writeln!(answers, "{answer}")?;
        answers.flush().context("answering the harness")
    };
    // Whoever reached this host knows by which address.
    let reached = std::env::var("SSH_CONNECTION").unwrap_or_default();
    answer(json!({ "ok": { "address": reached.split_whitespace().nth(2), "memory": agent.memory } }))?;
    loop {
        let mut line = Vec::new();
        let read = orders.by_ref().take(LONGEST_ORDER).read_until(b'\n', &mut line);
        if read.context("reading an order of the harness")? == 0 || !line.ends_with(b"\n") {
            return Ok(());
        }
        let order: Value = serde_json::from_slice(&line).context("an order is no JSON")?;
        let name = order["do"].as_str().unwrap_or_default();
        let done = match agent.carry_out(name, &order) {
            Some(done) => done,
            None => {
                more(name, &order).unwrap_or_else(|| Err(anyhow!("{name} is no order of this version's")))
            }
        };
        answer(match done {
            Ok(done) => json!({ "ok": done }),
            Err(error) => json!({ "error": format!("{error:#}") }),
        })?;
    }
}

impl Agent {
    fn carry_out(&mut self, name: &str, order: &Value) -> Option<Result<Value>> {
        Some(match name {
            "write" => self.write(order),
            "read" => read(order),
            "start" => self.start(order),
            "status" => self.status(order),
            "signal" => self.signal(order),
            "listens" => Ok(json!(text(order, "path").is_ok_and(|path| UnixStream::connect(path).is_ok()))),
            "log" => tail(&self.log(order)).map(Value::from).context("reading a log"),
            "interface" => interface(order),
            "remove" => text(order, "path").map(|path| json!(fs::remove_file(path).is_ok())),
            "time" => Ok(json!(unix_time())),
            "exists" => text(order, "path").map(|path| json!(Path::new(path).exists())),
            "opens" => text(order, "path").map(|path| json!(opens(path))),
            _ => return None,
        })
    }

    fn write(&self, order: &Value) -> Result<Value> {
        let path = Path::new(text(order, "path")?);
        let secret = order["secret"] == true;
        write(path, text(order, "text")?, secret).with_context(|| format!("writing {}", path.display()))?;
        Ok(Value::Null)
    }

    fn log(&self, order: &Value) -> PathBuf {
        self.directory.join(format!("{}.log", order["name"].as_str().unwrap_or_default()))
    }

    fn start(&mut self, order: &Value) -> Result<Value> {
        let program = text(order, "program")?;
        let log = self.log(order);
        let output: File = OpenOptions::new().create(true).append(true).open(&log)?;
        let mut command = Command::new(program);
        command.args(order["arguments"].as_array().into_iter().flatten().filter_map(Value::as_str));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        die_with_parent(&mut command);
        let child = command.spawn().with_context(|| format!("running {program}"))?;
        let pid = child.id();
        self.started.insert(pid, child);
        Ok(json!(pid))
    }

    fn child(&mut self, order: &Value) -> Result<&mut Child> {
        let pid = order["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
        self.started.get_mut(&pid.context("an order without a process")?).context("no such process")
    }

    /// Returns the exit status as waitpid(2) reports it; null while the process runs.
    fn status(&mut self, order: &Value) -> Result<Value> {
        Ok(json!(self.child(order)?.try_wait()?.map(ExitStatusExt::into_raw)))
    }

    fn signal(&mut self, order: &Value) -> Result<Value> {
        let child = self.child(order)?;
        if child.try_wait()?.is_some() {
            return Ok(Value::Null);
        }
        match text(order, "signal")? {
            "kill" => {
                child.kill()?;
                child.wait()?;
            }
            "terminate" => rustix::process::kill_process(Pid::from_child(child), Signal::TERM)?,
            other => bail!("there is no signal {other}"),
        }
        Ok(Value::Null)
    }
}

/// Writes a file; one that is secret can be read by its owner alone.
pub(crate) fn write(path: &Path, text: &str, secret: bool) -> io::Result<()> {
    let mode = if secret { 0o600 } else { 0o644 };
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())
}

impl Drop for Agent {
    fn drop(&mut self) {
        for child in self.started.values_mut() {
            // Fails only if it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
        for directory in [&self.directory, &self.memory] {
            // Nobody is left to be told.
            let _ = fs::remove_dir_all(directory);
        }
    }
}

fn read(order: &Value) -> Result<Value> {
    let path = text(order, "path")?;
    Ok(Value::from(fs::read_to_string(path).with_context(|| format!("reading {path}"))?))
}

/// Returns whether the file exists and can be read and written.
fn opens(path: &str) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

/// Finds the interface that has an address, and returns its name and its MTU.
fn interface(order: &Value) -> Result<Value> {
    let address = text(order, "address")?;
    let output =
        Command::new("ip").args(["-j", "-4", "address"]).output().context("running ip of iproute2")?;
    let interfaces: Value = serde_json::from_slice(&output.stdout).context("what ip says is no JSON")?;
    let has = |interface: &&Value| {
        let addresses = interface["addr_info"].as_array().into_iter().flatten();
        addresses.into_iter().any(|of| of["local"] == address)
    };
    let found = interfaces.as_array().into_iter().flatten().find(has);
    let found = found.with_context(|| format!("no interface of this host has the address {address}"))?;
    Ok(json!({ "name": found["ifname"], "mtu": found["mtu"] }))
}

fn text<'a>(order: &'a Value, key: &str) -> Result<&'a str> {
    order[key].as_str().with_context(|| format!("an order without {key}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(orders: &[Value]) -> (PathBuf, Vec<Value>) {
        let directory = tempfile::tempdir().expect("a directory").keep();
        let orders: String = orders.iter().map(|order| order.to_string() + "\n").collect();
        let orders = orders.replace("DIRECTORY", directory.to_str().expect("UTF-8"));
        let mut said = Vec::new();
        let mut more = |name: &str, _: &Value| (name == "more").then(|| Ok(json!(1)));
        serve(&directory, orders.as_bytes(), &mut said, &mut more).expect("orders");
        let said = String::from_utf8(said).expect("UTF-8");
        (directory, said.lines().skip(1).map(|line| serde_json::from_str(line).expect("JSON")).collect())
    }

    #[test]
    fn orders_are_carried_out_and_nothing_is_left() {
        let (directory, answers) = answers(&[
            json!({ "do": "write", "path": "DIRECTORY/a", "text": "one" }),
            json!({ "do": "read", "path": "DIRECTORY/a" }),
            json!({ "do": "start", "name": "n", "program": "/bin/sleep", "arguments": ["1000"] }),
            json!({ "do": "listens", "path": "DIRECTORY/socket" }),
            json!({ "do": "more" }),
        ]);
        assert_eq!(
            (&answers[1]["ok"], &answers[3]["ok"], &answers[4]["ok"]),
            (&json!("one"), &json!(false), &json!(1))
        );
        let pid = answers[2]["ok"].as_u64().expect("a process");
        assert!(!Path::new(&format!("/proc/{pid}")).exists() && !directory.exists());
    }

    #[test]
    fn what_fails_is_answered() {
        let (_, answers) = answers(&[
            json!({ "do": "fly" }),
            json!({ "do": "status", "pid": 1 }),
            json!({ "do": "start", "name": "n", "program": "/absent" }),
            json!({ "do": "interface", "address": "192.0.2.1" }),
            json!({ "do": "read" }),
        ]);
        for (answer, words) in
            answers.iter().zip(["no order", "no such process", "running /absent", "", "without path"])
        {
            assert!(answer["error"].as_str().is_some_and(|error| error.contains(words)), "{answer}");
        }
    }
}
