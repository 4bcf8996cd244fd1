//! Two hosts, and a Prometheus on one of them, which reads the metrics of both daemons.

use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::Path;
use std::time::Duration;

use memlane_lab::{HostId, LabProcess, Rig, wait_for};
use serde_json::Value;

use crate::alerts::RULES;
use crate::dashboards::FOLDER;
use crate::metrics::assert_known;

/// What the job is called here. Nothing may depend on that.
const JOB: &str = "hosts";
/// The address of daemons' metrics, as the lab configures it: Prometheus reaches that of its own host only.
const METRICS: (&str, u16) = ("127.0.0.1", 9410);
/// Prometheus listens there, on host A.
const LISTEN: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 9090);
/// The longest wait for a Prometheus to start, on a machine that is busy.
const START: Duration = Duration::from_secs(60);

/// Two hosts that are watched. All of it ends when this is dropped.
pub(crate) struct Watched {
    prometheus: LabProcess,
    /// The hosts.
    pub rig: Rig,
}

/// An alert, as Prometheus has read it.
#[derive(Debug)]
pub(crate) struct Rule {
    /// The name of the alert.
    pub name: String,
    /// The query that gives something while it has a reason to fire.
    pub query: String,
}

impl Watched {
    /// Starts a Prometheus that reads metrics each second, and knows the alerts.
    pub(crate) fn new(mut rig: Rig) -> Self {
        let mut targets = Vec::new();
        for id in [HostId::A, HostId::B] {
            let (address, port) = (rig.lab().host(id).control_address(), METRICS.1);
            let config = std::fs::read_to_string(rig.config_file(id)).expect("a configuration");
            let config = config.replace(&format!("{}:{port}", METRICS.0), &format!("{address}:{port}"));
            std::fs::write(rig.config_file(id), config).expect("a configuration");
            rig.start_daemon(id).expect("a daemon");
            targets.push(format!("'{address}:{port}'"));
        }
        let host = rig.lab().host(HostId::A);
        let directory = host.directory().join("prometheus");
        std::fs::create_dir(&directory).expect("a directory");
        let config = directory.join("prometheus.yml");
        let text = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: ['{}']\nscrape_configs:\n\
             - job_name: {JOB}\n  static_configs: [{{targets: [{}]}}]\n",
            Path::new(FOLDER).join(RULES).display(),
            targets.join(", ")
        );
        std::fs::write(&config, text).expect("a configuration");
        let mut command = host.command("prometheus");
        let listen = format!("--web.listen-address={}:{}", LISTEN.0, LISTEN.1);
        command.args([listen.as_str(), "--log.level=warn", "--config.file"]).arg(&config);
        command.arg("--storage.tsdb.path").arg(directory.join("data"));
        let prometheus = host.spawn("prometheus", command).expect("prometheus");
        let mut watched = Self { prometheus, rig };
        let ready = wait_for("Prometheus", START, || {
            assert!(watched.prometheus.is_running(), "{}", watched.prometheus.log_tail());
            watched.get("/-/ready").ok().filter(|answer| answer.starts_with("HTTP/1.0 200"))
        });
        ready.unwrap_or_else(|error| panic!("{error:#}: {}", watched.prometheus.log_tail()));
        watched
    }

    /// Waits until a query gives something.
    pub(crate) fn wait_until(&self, query: &str, patience: Duration) {
        let seen = wait_for(query, patience, || (!self.query(query).is_empty()).then_some(()));
        seen.expect("Prometheus sees it");
    }

    /// Returns what a query gives now.
    pub(crate) fn query(&self, query: &str) -> Vec<Value> {
        self.result(&format!("/api/v1/query?query={}", encoded(query)), query)
    }

    /// Returns what a query gave in each second between two times since 1970.
    pub(crate) fn query_range(&self, query: &str, since: Duration, until: Duration) -> Vec<Value> {
        let (start, end) = (since.as_secs_f64(), until.as_secs_f64());
        let path = format!("/api/v1/query_range?query={}&start={start}&end={end}&step=1", encoded(query));
        self.result(&path, query)
    }

    /// Returns all alerts, which Prometheus must be able to work out.
    pub(crate) fn rules(&self) -> Vec<Rule> {
        let data = self.ask("/api/v1/rules?type=alert", "the rules");
        let groups = data["groups"].as_array().expect("groups").iter();
        let rules = groups.flat_map(|group| group["rules"].as_array().expect("rules"));
        let text = |rule: &Value, key: &str| rule[key].as_str().expect("text").to_owned();
        rules
            .map(|rule| {
                assert_ne!(rule["health"], "err", "{rule}");
                let rule = Rule { name: text(rule, "name"), query: text(rule, "query") };
                assert_known(&rule.query);
                rule
            })
            .collect()
    }

    fn result(&self, path: &str, what: &str) -> Vec<Value> {
        self.ask(path, what)["result"].as_array().expect("a list of series").clone()
    }

    fn ask(&self, path: &str, what: &str) -> Value {
        let answer = self.get(path).unwrap_or_else(|error| panic!("asking for {what}: {error}"));
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
        let mut answer: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {body}"));
        assert_eq!(answer["status"], "success", "{what}: {answer}");
        answer["data"].take()
    }

    fn get(&self, path: &str) -> io::Result<String> {
        let host = self.rig.lab().host(HostId::A);
        let mut stream = host.run_in(|| TcpStream::connect(LISTEN)).map_err(io::Error::other)??;
        // In this version of HTTP the answer is not cut into chunks.
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
        io::read_to_string(stream)
    }
}

/// Encodes a text for the query of a URL.
fn encoded(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}
