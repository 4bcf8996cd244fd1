//! The commands about keys. They work on files, and need no daemon.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use memlane_keys::{Authority, Description, Validity, describe};
use serde::Serialize;

use crate::args::KeysCommand;
use crate::exit::Error;
use crate::show;

/// What was made, for scripts.
#[derive(Serialize)]
struct Made<'a> {
    directory: &'a Path,
    certificates: Vec<Description>,
}

/// Carries out a command about keys.
///
/// # Errors
///
/// Fails if the keys cannot be made, or those that are there cannot be read.
pub(crate) fn run(command: &KeysCommand, json: bool) -> Result<(), Error> {
    match command {
        KeysCommand::Init { dir, name } => init(dir, name, json),
        KeysCommand::Issue { host, dir, out, days } => {
            let out = out.clone().unwrap_or_else(|| dir.join(host));
            issue(host, dir, &out, *days, json)
        }
        KeysCommand::Show { path } => show_all(path, json),
    }
}

fn init(directory: &Path, name: &str, json: bool) -> Result<(), Error> {
    Authority::new(name)?.save(directory)?;
    if json {
        return made(directory);
    }
    show::line(&format!(
        "made an authority in {dir}; keep its key, {dir}/ca.key, where no host of the fleet can read it\n\
         next, for each host: memlanectl keys issue HOST --dir {dir}",
        dir = directory.display()
    ));
    Ok(())
}

fn issue(host: &str, directory: &Path, out: &Path, days: u64, json: bool) -> Result<(), Error> {
    Authority::open(directory)?.issue_to(out, host, Validity::days(days))?;
    if json {
        return made(out);
    }
    show::line(&format!(
        "made the keys of {host} in {out}, valid for {days} days\n\
         next, as root on {host}: put the three files into /etc/memlane/keys, readable for the daemon's user alone, and \
         start the daemon; one that runs takes new keys with systemctl reload memlaned",
        out = out.display()
    ));
    Ok(())
}

fn made(directory: &Path) -> Result<(), Error> {
    show::json(&Made { directory, certificates: describe(directory)? });
    Ok(())
}

fn show_all(path: &Path, json: bool) -> Result<(), Error> {
    let all = describe(path)?;
    if json {
        show::json(&all);
    } else {
        all.iter().for_each(|one| show::line(&text(one)));
    }
    Ok(())
}

fn text(of: &Description) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    let state = match () {
        () if now < of.valid_from_seconds => "not valid yet".to_owned(),
        () if now > of.valid_until_seconds => "expired".to_owned(),
        () => format!("valid for {} more days", (of.valid_until_seconds - now) / 86_400),
    };
    let what = match of.authority {
        true => format!("the authority {}", of.subject),
        false => format!("the certificate of {}", of.hosts.join(", ")),
    };
    let mut text = format!("{}: {what}", of.file.display());
    let _ = write!(text, "\n  {:<10}  {state}", "validity");
    let _ = write!(text, "\n  {:<10}  {}", "issuer", of.issuer);
    match of.signed_by_ca {
        Some(true) => {}
        Some(false) => {
            let _ = write!(text, "\n  {:<10}  none in the ca.pem beside it has signed it", "authority");
        }
        None => {
            let _ = write!(text, "\n  {:<10}  there is no ca.pem beside it to check it with", "authority");
        }
    }
    let _ = write!(text, "\n  {:<10}  {}", "SHA-256", of.sha256);
    text
}
