//! Memlane itself in a lab: a daemon on each host, guests attached to them, and orders.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::host::Host;
use crate::hosts::Hosts;
use crate::lab::{HostId, Lab, LabOptions};
use crate::linux::LinuxGuest;
use crate::process::Process;
use crate::programs::Programs;
use crate::rate::Rate;
use crate::user::DaemonUser;
use crate::wait::wait_for;

/// Longest wait for a daemon or a VMM to come up, on a machine that is busy with other things.
const START: Duration = Duration::from_secs(60);
/// Longest wait for an answer of a VMM: it may have to replay a long run.
const ANSWER: Duration = Duration::from_secs(300);

/// Name of the socket of a daemon's API, in its host's directory.
const API_SOCKET: &str = "api.sock";

/// Two hosts with a daemon each.
#[derive(Debug)]
pub struct Rig {
    programs: Programs,
    /// Keys to add to both configurations, before their tables.
    keys: String,
    /// Tables to add to both configurations.
    tables: String,
    may_start_guests: bool,
    daemon_user: DaemonUser,
    /// Variables for the daemons' environment.
    environment: Vec<(String, String)>,
    speed: Option<String>,
    daemons: [Option<Process>; 2],
    started: u32,
    // Dropped last, after everything that runs in it.
    lab: Lab,
}

/// What is to be different from host to host, or from the defaults.
#[derive(Clone, Debug, Default)]
pub struct RigOptions {
    /// The hosts and their ports.
    pub lab: LabOptions,
    /// Keys to add to both configurations, before their tables.
    pub keys: String,
    /// Tables to add to both configurations, such as `[limits]`.
    pub tables: String,
    /// Whether each daemon starts QEMU for guests that the other one sends.
    pub may_start_guests: bool,
    /// Who both daemons run as.
    pub daemon_user: DaemonUser,
    /// Variables to add to the daemons' environment.
    pub environment: Vec<(String, String)>,
}

/// A running `memlane-vmm`.
#[derive(Debug)]
pub struct Vmm {
    process: Process,
    control: PathBuf,
}

/// A connection to a `memlane-vmm`, which is lost when that ends.
#[derive(Debug)]
pub struct VmmSession {
    stream: BufReader<UnixStream>,
}

/// A guest that is followed. What is told of it should be fetched a few times a second.
#[derive(Debug)]
pub struct Following {
    stream: BufReader<UnixStream>,
    /// A line that has not come in full.
    line: Vec<u8>,
}

/// What `memlanectl` said.
#[derive(Debug)]
pub struct Answer {
    /// Its exit code.
    pub code: i32,
    /// Lines of JSON on stdout.
    pub json: Vec<Value>,
    /// Everything else that it said, for messages.
    pub text: String,
}

impl Rig {
    /// Makes the hosts and starts both daemons.
    ///
    /// # Errors
    ///
    /// If the lab cannot be made, or a daemon does not come up.
    pub fn new(programs: &Programs, options: RigOptions) -> Result<Self> {
        let lab = Lab::new(options.lab.clone())?;
        Self::start(programs, lab, options)
    }

    /// Reaches hosts that are there already and starts both daemons, with `tables` added to both configurations. Each
    /// port carries so much, if that is known.
    ///
    /// # Errors
    ///
    /// If a host cannot be reached, or a daemon does not come up.
    pub fn over_ssh(programs: &Programs, hosts: &Hosts, speed: Option<Rate>, tables: String) -> Result<Self> {
        let lab = LabOptions { port_rate: speed, ..LabOptions::default() };
        Self::start(
            programs,
            Lab::over_ssh(hosts, programs)?,
            RigOptions { lab, tables, ..RigOptions::default() },
        )
    }

    fn start(programs: &Programs, lab: Lab, options: RigOptions) -> Result<Self> {
        let RigOptions { lab: of_lab, keys, tables, may_start_guests, daemon_user, environment } = options;
        let speed = of_lab.port_rate.map(|rate| format!("{}bit", rate.bits_per_second()));
        let mut rig = Self {
            programs: programs.clone(),
            keys,
            tables,
            may_start_guests,
            daemon_user,
            environment,
            speed,
            daemons: [None, None],
            started: 0,
            lab,
        };
        for id in [HostId::A, HostId::B] {
            rig.daemon_user.settle(rig.lab.host(id))?;
            rig.write_config(id, "")?;
            rig.start_daemon(id)?;
        }
        Ok(rig)
    }

    /// The hosts.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The daemon of a host.
    ///
    /// # Panics
    ///
    /// If it has been stopped.
    pub fn daemon(&mut self, id: HostId) -> &mut Process {
        self.daemons[id as usize].as_mut().expect("the daemon has been started")
    }

    /// Where a host's daemon listens for orders, as it is reached from here.
    pub fn api_socket(&self, id: HostId) -> PathBuf {
        let host = self.lab.host(id);
        // Whoever asks has started the daemon, and that has reached its socket before.
        host.reach(API_SOCKET).unwrap_or_else(|_| host.directory().join(API_SOCKET))
    }

    /// A host's configuration file.
    pub fn config_file(&self, id: HostId) -> PathBuf {
        self.lab.host(id).directory().join("memlaned.toml")
    }

    /// Writes a host's configuration anew, with `more` at its end. For the next start.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write_config(&self, id: HostId, more: &str) -> Result<()> {
        let other = if id == HostId::A { HostId::B } else { HostId::A };
        let text = self.config(self.lab.host(id), self.lab.host(other)) + more;
        self.lab.host(id).write(&self.config_file(id), &text)
    }

    fn config(&self, host: &Host, peer: &Host) -> String {
        let directory = host.directory().display();
        let mut text = format!(
            "insecure = true\nhost = \"{name}\"\ncontrol = \"{control}\"\n\
             api_socket = \"{directory}/api.sock\"\nattach_socket = \"{directory}/attach.sock\"\n\
             journal = \"{directory}/journal\"\nmetrics = \"127.0.0.1:9410\"\n{keys}\n\
             [guests]\ndirectory = \"{directory}/guests\"\nmemory = \"{memory}\"\nshim = \"{shim}\"\n\
             qemu = [\"{qemu}\"]\n\
             [[peer]]\nname = \"{peer}\"\ncontrol = \"{peer_control}\"\n\
             may_start_guests = {may_start_guests}\n",
            name = host.name(),
            control = host.control_address(),
            keys = self.keys,
            memory = host.memory_directory().display(),
            shim = host.program(&self.programs, "libmemlane_shim.so").display(),
            qemu = host.qemu().display(),
            may_start_guests = self.may_start_guests,
            peer = peer.name(),
            peer_control = peer.control_address(),
        );
        // Daemons pair ports by their names, and the interfaces of hosts that are there already may differ in theirs.
        for (number, port) in host.ports().iter().enumerate() {
            let (interface, address) = (&port.interface, port.address);
            text += &format!(
                "[[port]]\nname = \"port{number}\"\ninterface = \"{interface}\"\naddress = \"{address}\"\n"
            );
            if let Some(speed) = &self.speed {
                text += &format!("speed = \"{speed}\"\n");
            }
        }
        if let Some(bridge) = host.bridge() {
            text += &format!("[[network]]\nname = \"lan\"\nbridge = \"{}\"\n", bridge.interface);
        }
        text + &self.tables
    }

    /// Starts a host's daemon; one that runs is killed first.
    ///
    /// # Errors
    ///
    /// If it does not come up; the end of its log is in the error.
    pub fn start_daemon(&mut self, id: HostId) -> Result<()> {
        self.start_daemon_unattended(id)?;
        let Self { daemons, lab, .. } = self;
        let host = lab.host(id);
        let daemon = daemons[id as usize].as_mut().expect("it has just been started");
        host.reach(API_SOCKET)?;
        let up = wait_for("the daemon", START, || {
            (!daemon.is_running() || host.listens(API_SOCKET)).then_some(())
        });
        up.with_context(|| daemon.log_tail())?;
        ensure!(daemon.is_running(), "memlaned has ended:\n{}", daemon.log_tail());
        Ok(())
    }

    /// As [`Rig::start_daemon`], but returns at once.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start_daemon_unattended(&mut self, id: HostId) -> Result<()> {
        self.stop_daemon(id)?;
        let (host, file) = (self.lab.host(id), self.config_file(id));
        let words = self.daemon_user.words(&host.program(&self.programs, "memlaned"));
        let mut command = host.command(&words[0]);
        command.args(&words[1..]).arg("--config").arg(file).envs(self.environment.iter().cloned());
        self.daemons[id as usize] = Some(host.spawn("memlaned", command)?);
        Ok(())
    }

    /// Kills a host's daemon (SIGKILL), as a crash would.
    ///
    /// # Errors
    ///
    /// If it cannot be killed.
    pub fn stop_daemon(&mut self, id: HostId) -> Result<()> {
        if let Some(mut daemon) = self.daemons[id as usize].take() {
            daemon.kill()?;
        }
        Ok(())
    }

    /// Starts a VMM on a host with `arguments` besides those that attach it, and waits until
    /// the daemon knows its guest.
    ///
    /// # Errors
    ///
    /// If it does not come up; the end of its log is in the error.
    pub fn start_vmm(&mut self, id: HostId, name: &str, arguments: &[String]) -> Result<Vmm> {
        let mut vmm = self.start_vmm_unattended(id, name, arguments)?;
        let attached = wait_for("the guest", START, || {
            let known = self.guest(id, name).is_ok_and(|guest| guest.is_some());
            (known || !vmm.process.is_running()).then_some(())
        });
        attached.with_context(|| vmm.process.log_tail())?;
        ensure!(vmm.process.is_running(), "memlane-vmm has ended:\n{}", vmm.process.log_tail());
        Ok(vmm)
    }

    /// As [`Rig::start_vmm`], but returns at once.
    ///
    /// # Errors
    ///
    /// If the program cannot be started.
    pub fn start_vmm_unattended(&mut self, id: HostId, name: &str, arguments: &[String]) -> Result<Vmm> {
        self.started += 1;
        let host = self.lab.host(id);
        let control = format!("vmm{}.sock", self.started);
        let mut command = host.command(host.program(&self.programs, "memlane-vmm"));
        command.args(["--name", name]).arg("--attach").arg(host.directory().join("attach.sock"));
        command.arg("--control").arg(host.directory().join(&control)).args(arguments);
        let process = host.spawn(&format!("vmm{}", self.started), command)?;
        Ok(Vmm { process, control: host.reach(&control)? })
    }

    /// Makes what a Linux guest needs on both hosts, a tap on each, and writes its guest file, whose path is returned.
    ///
    /// # Errors
    ///
    /// If the taps are there already, or the file cannot be written.
    pub fn prepare_linux(&self, guest: &LinuxGuest) -> Result<PathBuf> {
        for host in self.lab.hosts() {
            host.add_tap(&guest.tap)?;
        }
        let file = self.lab.host(HostId::A).directory().join(format!("{}.toml", guest.name));
        std::fs::write(&file, guest.file()).with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    /// What a host's daemon says about a guest; `None` if it does not know it.
    ///
    /// # Errors
    ///
    /// If the daemon does not answer.
    pub fn guest(&self, id: HostId, name: &str) -> Result<Option<Value>> {
        let answer = self.ctl(id, &["guests"])?;
        let guests =
            answer.last()?.as_array().with_context(|| format!("no list of guests: {}", answer.text))?;
        Ok(guests.iter().find(|guest| guest["name"] == name).cloned())
    }

    /// A host's daemon's metrics, in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// If the daemon does not answer.
    pub fn metrics(&self, id: HostId) -> Result<String> {
        let mut stream = UnixStream::connect(self.api_socket(id)).context("connecting to the daemon")?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: memlaned\r\nConnection: close\r\n\r\n")?;
        let answer = io::read_to_string(stream).context("reading the daemon's metrics")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("the daemon's answer has no end")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "the daemon tells no metrics: {head}");
        Ok(body.to_owned())
    }

    /// A `memlanectl` command for a host's daemon.
    pub fn ctl_command(&self, id: HostId, arguments: &[&str]) -> Command {
        let mut command = self.lab.host(id).command(self.programs.path("memlanectl"));
        command.arg("--socket").arg(self.api_socket(id)).args(arguments);
        command
    }

    /// Follows a migration to its end with `memlanectl --json watch`; `look` sees each of its states as it is told,
    /// and the last one is returned.
    ///
    /// # Errors
    ///
    /// If `memlanectl` cannot be run, or tells nothing; what it says else goes to stderr.
    pub fn watch(&self, id: HostId, migration: &str, mut look: impl FnMut(&Value)) -> Result<Value> {
        let mut command = self.ctl_command(id, &["--json", "watch", migration]);
        let mut child = command.stdout(Stdio::piped()).spawn().context("running memlanectl")?;
        let mut last = None;
        for line in BufReader::new(child.stdout.take().expect("it is piped")).lines() {
            let state = serde_json::from_str(&line.context("reading what memlanectl says")?)
                .context("memlanectl watch said what is no JSON")?;
            look(&state);
            last = Some(state);
        }
        child.wait().context("waiting for memlanectl")?;
        last.with_context(|| format!("memlanectl watch told nothing about {migration}"))
    }

    /// Runs `memlanectl --json` against a host's daemon.
    ///
    /// # Errors
    ///
    /// If it cannot be run, or is killed. Its own failures are in the answer's code.
    pub fn ctl(&self, id: HostId, arguments: &[&str]) -> Result<Answer> {
        let mut command = self.ctl_command(id, &["--json"]);
        let Output { status, stdout, stderr } =
            command.args(arguments).output().context("running memlanectl")?;
        let stdout = String::from_utf8_lossy(&stdout);
        let json = stdout.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let text = format!("{stdout}{}", String::from_utf8_lossy(&stderr));
        Ok(Answer { code: status.code().context("memlanectl was killed")?, json, text })
    }
}

impl Answer {
    /// The last object.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn last(&self) -> Result<&Value> {
        self.json.last().with_context(|| format!("memlanectl printed no JSON: {}", self.text))
    }
}

impl Vmm {
    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// How the guest is doing.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn stats(&mut self) -> Result<Value> {
        self.ask("stats")
    }

    /// Forgets the stalls so far.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn reset_stalls(&mut self) -> Result<()> {
        self.ask("reset-stalls").map(drop)
    }

    /// Compares all of the guest's RAM with the model.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer.
    pub fn verify(&mut self) -> Result<Value> {
        self.ask("verify")
    }

    /// Ends the VMM.
    ///
    /// # Errors
    ///
    /// If it does not end.
    pub fn quit(mut self) -> Result<()> {
        self.ask("quit")?;
        ensure!(self.process.wait_timeout(START)?.is_some(), "memlane-vmm does not end");
        Ok(())
    }

    /// A connection of its own to the VMM, for who asks often, or may ask one that is about to end.
    ///
    /// # Errors
    ///
    /// If the VMM does not listen.
    pub fn session(&self) -> Result<VmmSession> {
        let stream = wait_for("the VMM's control socket", START, || UnixStream::connect(&self.control).ok())?;
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(VmmSession { stream: BufReader::new(stream) })
    }

    fn ask(&mut self, what: &str) -> Result<Value> {
        let answer = self.session().and_then(|mut session| session.ask(what));
        let failed = || format!("asking {} for {what}", self.process.name());
        answer.with_context(failed).map_err(|error| error.context(self.process.log_tail()))
    }
}

impl VmmSession {
    /// How the guest is doing.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has ended.
    pub fn stats(&mut self) -> Result<Value> {
        self.ask("stats")
    }

    /// Compares all of the guest's RAM with the model.
    ///
    /// # Errors
    ///
    /// If the VMM does not answer, or has ended.
    pub fn verify(&mut self) -> Result<Value> {
        self.ask("verify")
    }

    /// Waits no longer than this for an answer from now on.
    ///
    /// # Errors
    ///
    /// If the system refuses.
    pub fn set_patience(&mut self, longest: Duration) -> Result<()> {
        Ok(self.stream.get_ref().set_read_timeout(Some(longest))?)
    }

    /// Has the VMM tell how far the guest is, every so often while there is a guest.
    ///
    /// # Errors
    ///
    /// If the VMM has ended.
    pub fn follow(mut self, every: Duration) -> Result<Following> {
        let request = format!("{{\"do\":\"follow\",\"every_us\":{}}}\n", every.as_micros());
        self.stream.get_mut().write_all(request.as_bytes())?;
        self.stream.get_ref().set_nonblocking(true)?;
        Ok(Following { stream: self.stream, line: Vec::new() })
    }

    fn ask(&mut self, what: &str) -> Result<Value> {
        self.stream.get_mut().write_all(format!("{{\"do\":\"{what}\"}}\n").as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let mut answer: Value = serde_json::from_str(&line).context("the VMM's answer is no JSON")?;
        match answer.get("error") {
            Some(error) => bail!("{error}"),
            None => Ok(answer["ok"].take()),
        }
    }
}

impl Following {
    /// What was told since this was asked last, without waiting; `None` once the VMM has ended.
    ///
    /// # Errors
    ///
    /// If what was told is no JSON.
    pub fn told(&mut self) -> Result<Option<Vec<Value>>> {
        let mut told = Vec::new();
        loop {
            match self.stream.read_until(b'\n', &mut self.line) {
                Ok(_) if self.line.ends_with(b"\n") => {
                    let mut answer: Value =
                        serde_json::from_slice(&self.line).context("what the VMM tells is no JSON")?;
                    told.push(answer["ok"].take());
                    self.line.clear();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Some(told)),
                // Its end is told by whoever waits for it.
                Ok(_) | Err(_) => return Ok((!told.is_empty()).then_some(told)),
            }
        }
    }
}
