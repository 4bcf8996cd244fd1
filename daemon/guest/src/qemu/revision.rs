//! A guest that has changed since its QEMU was started moves as it is now: its guest file is revised by what was
//! unplugged, inserted, ejected and limited, so that the receiving QEMU is started from what there is. What the file
//! cannot say is refused by name.

use memlane_protocol::wire::control::MAX_DEFINITION_BYTES;
use memlane_qmp::options::{Options, Properties, Value, Written};

use super::definition::Definition;
use super::machine::{Device, Drive, LIMITS, Parts, missing};
use crate::Blocker;

/// Revises a guest file, from which a QEMU of parts `then` was started that has parts `now`. Returns `None` if nothing has
/// changed.
///
/// # Errors
///
/// Returns the changes that a guest file cannot say.
pub(super) fn revise(
    definition: &Definition,
    then: &Parts,
    now: &Parts,
) -> Result<Option<Definition>, Vec<Blocker>> {
    if then == now {
        return Ok(None);
    }
    let mut revision = Revision { arguments: definition.arguments.clone(), refused: Vec::new() };
    for device in then.devices.iter().filter(|device| !now.devices.contains(device)) {
        revision.unplug(device);
    }
    for device in now.devices.iter().filter(|device| !then.devices.contains(device)) {
        let how = if device.id.is_empty() { "its path" } else { device.id.as_str() };
        let remedy = format!("unplug it (device_del {how}) for the time of the move");
        revision.refuse(format!("{device} was plugged in since the guest was started"), remedy);
    }
    for module in missing(&now.modules, &then.modules) {
        let remedy = "unplug it for the time of the move".to_owned();
        revision.refuse(format!("{module} was plugged in since the guest was started"), remedy);
    }
    for module in missing(&then.modules, &now.modules) {
        let remedy = "plug in one like it for the time of the move, or start the guest anew".to_owned();
        revision.refuse(format!("{module} was unplugged since the guest was started"), remedy);
    }
    for backend in then.backends.difference(&now.backends) {
        revision.drop_backend(backend);
    }
    for (name, before) in &then.drives {
        match now.drives.get(name) {
            Some(after) if after != before => revision.change(name, before, after),
            Some(_) => {}
            None => revision.remove("-drive", name),
        }
    }
    let Revision { arguments, refused } = revision;
    if !refused.is_empty() {
        return Err(refused);
    }
    let revised = definition.with_arguments(arguments);
    if revised.text.len() > MAX_DEFINITION_BYTES {
        let detail = format!(
            "the guest file would have more than {MAX_DEFINITION_BYTES} bytes with what has changed since the guest was started"
        );
        return Err(vec![Blocker::new(
            "device",
            detail,
            Some("change that back for the time of the move".to_owned()),
        )]);
    }
    Ok(Some(revised))
}

/// Has the receiving QEMU show the guest the identity that it has, where the guest file leaves it to QEMU to choose one.
pub(super) fn with_identity(definition: &Definition, guid: &str) -> Option<Definition> {
    let mut arguments = definition.arguments.clone();
    let mut changed = false;
    for argument in &mut arguments {
        let Ok(mut device) = Written::parse(argument, "driver") else { continue };
        // QEMU chooses one, too, where none is named.
        let chooses = device.get("guid").is_none_or(|guid| guid == "auto");
        if device.get("driver").as_deref() == Some("vmgenid") && chooses {
            device.set("guid", Value::Text(guid));
            (*argument, changed) = (device.to_string(), true);
        }
    }
    let kept = changed.then(|| definition.with_arguments(arguments));
    // One that is too long to travel is left as it was: the destination refuses the guest by its identity.
    kept.filter(|kept| kept.text.len() <= MAX_DEFINITION_BYTES)
}

struct Revision {
    arguments: Vec<String>,
    refused: Vec<Blocker>,
}

impl Revision {
    fn refuse(&mut self, detail: String, remedy: String) {
        self.refused.push(Blocker::new("device", detail, Some(remedy)));
    }

    fn unplug(&mut self, device: &Device) {
        let before = self.arguments.len();
        if !device.id.is_empty() {
            self.remove("-device", &device.id);
        }
        // What was below a device that was unplugged went with it, and may have been made by it.
        if before == self.arguments.len() && !self.is_implied(device) {
            let remedy = "plug in one like it for the time of the move, or start the guest anew".to_owned();
            let detail = format!(
                "{device} was unplugged since the guest was started, and no -device of its guest file has its id"
            );
            self.refuse(detail, remedy);
        }
    }

    /// Tells whether a device comes with one that is named in no argument any more.
    fn is_implied(&self, device: &Device) -> bool {
        device.id.is_empty()
            && !self.named("-device").any(|(_, text)| kind_of(text).as_deref() == Some(device.kind.as_str()))
    }

    /// Takes out what describes a back end that is gone, whichever option it was given by.
    fn drop_backend(&mut self, name: &str) {
        for option in ["-blockdev", "-netdev", "-object"] {
            self.remove(option, name);
        }
    }

    /// Takes out an option whose value has this id.
    fn remove(&mut self, option: &str, id: &str) {
        let found = self.named(option).find(|(_, text)| id_of(text).as_deref() == Some(id)).map(|(at, _)| at);
        if let Some(at) = found {
            self.arguments.drain(at - 1..=at);
        }
    }

    /// Changes what is in a drive, and its limits.
    fn change(&mut self, name: &str, before: &Drive, after: &Drive) {
        let at = self.drive(name, before);
        let Some(at) = at else {
            let what = if before.file == after.file { "the limits of" } else { "what is in" };
            let detail = format!(
                "{what} drive {name} was changed since the guest was started, and no -drive of its guest file \
                                  is known to be it"
            );
            let remedy = "give it an id in the guest file (-drive id=NAME), or change it back for the time of the move";
            return self.refuse(detail, remedy.to_owned());
        };
        let mut options = Options::parse(&self.arguments[at], "file");
        if before.file != after.file {
            match &after.file {
                Some(file) => {
                    options.set("file", Value::Text(file));
                    options.set("format", Value::Text(&after.format));
                    options.set("readonly", Value::Switch(after.read_only));
                }
                None => ["file", "format", "readonly"].iter().for_each(|key| options.remove(key)),
            }
        }
        for key in LIMITS {
            let (name, limit) = (limit_option(key), after.limits.get(key));
            if limit != before.limits.get(key) {
                match limit {
                    Some(limit) => options.set(&name, Value::Text(&limit.to_string())),
                    None => options.remove(&name),
                }
            }
        }
        self.arguments[at] = options.to_string();
    }

    /// Finds the value of the option that describes a drive: by its id, or by the file that was in it.
    fn drive(&mut self, name: &str, before: &Drive) -> Option<usize> {
        let by_id =
            self.named("-drive").find(|(_, text)| id_of(text).as_deref() == Some(name)).map(|(at, _)| at);
        let file = before.file.as_deref();
        let with_file =
            |text: &str| file.is_some() && Options::parse(text, "file").get("file").as_deref() == file;
        let mut by_file = self.named("-drive").filter(|(_, text)| with_file(text)).map(|(at, _)| at);
        if let Some(at) = by_id.or(by_file.next().filter(|_| by_file.next().is_none())) {
            return Some(at);
        }
        drop(by_file);
        // A short way to write a drive.
        let at = self.named("-cdrom").find(|(_, text)| Some(*text) == file)?.0;
        let mut options = Options::parse("if=ide,index=2,media=cdrom", "file");
        options.set("file", Value::Text(file?));
        self.arguments[at - 1] = "-drive".to_owned();
        self.arguments[at] = options.to_string();
        Some(at)
    }

    /// Returns the values of an option, and where they are among the arguments. QEMU takes one dash or two.
    fn named<'a>(&'a self, option: &'a str) -> impl Iterator<Item = (usize, &'a str)> + 'a {
        let pairs = self.arguments.windows(2).enumerate();
        pairs.filter_map(move |(at, pair)| {
            let is_named = pair[0] == option || pair[0].strip_prefix('-') == Some(option);
            is_named.then(|| (at + 1, pair[1].as_str()))
        })
    }
}

/// Returns the id that the value of an option gives.
fn id_of(text: &str) -> Option<String> {
    let value = Written::parse(text, "driver").ok()?;
    value.get("id").or_else(|| value.get("node-name"))
}

fn kind_of(text: &str) -> Option<String> {
    Written::parse(text, "driver").ok()?.get("driver")
}

/// Returns the option of `-drive` for a limit that `query-block` calls `key`.
fn limit_option(key: &str) -> String {
    if key == "iops_size" {
        return "throttling.iops-size".to_owned();
    }
    let (unit, rest) = key.split_once('_').map_or((key, ""), |(unit, rest)| (unit, rest));
    let (way, max) = match rest {
        "" => ("total", ""),
        "rd" => ("read", ""),
        "wr" => ("write", ""),
        "max" => ("total", "-max"),
        "rd_max" => ("read", "-max"),
        _ => ("write", "-max"),
    };
    format!("throttling.{unit}-{way}{max}")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn definition(arguments: &[&str]) -> Definition {
        let arguments = serde_json::Value::from(arguments.to_vec());
        let text = format!("name = \"web1\"\nmemory = \"64MiB\"\narguments = {arguments}\n");
        Definition::parse(Path::new("web1.toml"), &text).unwrap()
    }

    fn device(id: &str, kind: &str) -> Device {
        Device { bus: "pcie.0".into(), kind: kind.into(), id: id.into(), at: String::new() }
    }

    fn drive(file: Option<&str>) -> Drive {
        Drive { file: file.map(str::to_owned), format: "raw".into(), read_only: true, ..Drive::default() }
    }

    #[track_caller]
    fn revised(arguments: &[&str], then: &Parts, now: &Parts) -> Vec<String> {
        let revised = revise(&definition(arguments), then, now).unwrap().unwrap();
        // What travels is the text.
        let read = Definition::parse(Path::new("web1.toml"), &revised.text).unwrap();
        assert_eq!(read.arguments, revised.arguments);
        read.arguments
    }

    #[test]
    fn what_has_not_changed_is_not_revised() {
        let parts = Parts { devices: vec![device("d0", "virtio-blk-pci")], ..Parts::default() };
        assert_eq!(revise(&definition(&[]), &parts, &parts), Ok(None));
    }

    #[test]
    fn an_unplugged_disk_is_not_opened_again() {
        const ARGUMENTS: &[&str] = &[
            "-blockdev",
            "driver=file,node-name=f0,filename=/srv/a",
            "-device",
            "virtio-blk-pci,drive=f0,id=d0",
            "-drive",
            "file=/srv/b,if=none,id=b",
            "-device",
            "{\"driver\":\"virtio-blk-pci\",\"drive\":\"b\",\"id\":\"d1\"}",
            "-smp",
            "2",
        ];
        let mut then = Parts {
            devices: vec![device("d0", "virtio-blk-pci"), device("d1", "virtio-blk-pci")],
            ..Parts::default()
        };
        then.backends.insert("f0".into());
        then.drives.insert("b".into(), drive(Some("/srv/b")));
        assert_eq!(revised(ARGUMENTS, &then, &Parts::default()), ["-smp", "2"]);
    }

    #[test]
    fn media_are_those_of_now() {
        let parts = |file: Option<&str>| Parts {
            drives: [("cd".to_owned(), drive(file))].into(),
            ..Parts::default()
        };
        let arguments = ["--drive", "if=none,id=cd,media=cdrom,file=/srv/a.iso"];
        let ejected = ["--drive", "if=none,id=cd,media=cdrom"];
        assert_eq!(revised(&arguments, &parts(Some("/srv/a.iso")), &parts(None)), ejected);
        let other = ["--drive", "if=none,id=cd,media=cdrom,file=/srv/b,,2.iso,format=raw,readonly=on"];
        assert_eq!(revised(&arguments, &parts(Some("/srv/a.iso")), &parts(Some("/srv/b,2.iso"))), other);
        assert_eq!(revised(&ejected, &parts(None), &parts(Some("/srv/b,2.iso"))), other);
        let short = ["-cdrom", "/srv/a.iso"];
        let parts = |file: Option<&str>| Parts {
            drives: [("ide1-cd0".to_owned(), drive(file))].into(),
            ..Parts::default()
        };
        let ejected = ["-drive", "if=ide,index=2,media=cdrom"];
        assert_eq!(revised(&short, &parts(Some("/srv/a.iso")), &parts(None)), ejected);
        // Which drive it is, nothing says.
        let told = revise(&definition(&ejected), &parts(None), &parts(Some("/srv/a.iso"))).unwrap_err();
        assert!(
            told[0].detail.contains("drive ide1-cd0") && told[0].remedy.as_ref().unwrap().contains("id=NAME")
        );
    }

    #[test]
    fn limits_are_those_of_now() {
        let parts = |limits: &[(&str, u64)]| {
            let limits = limits.iter().map(|(key, limit)| (key.to_string(), *limit)).collect();
            let drive = Drive { limits, ..drive(Some("/srv/a")) };
            Parts { drives: [("d".to_owned(), drive)].into(), ..Parts::default() }
        };
        let (free, limited) =
            (["-drive", "id=d,file=/srv/a"], ["-drive", "id=d,file=/srv/a,throttling.bps-total=1000000"]);
        assert_eq!(revised(&free, &parts(&[]), &parts(&[("bps", 1_000_000)])), limited);
        assert_eq!(revised(&limited, &parts(&[("bps", 1_000_000)]), &parts(&[])), free);
        let names = ["bps_rd", "iops_wr_max", "iops_size", "iops"].map(limit_option);
        let options = ["bps-read", "iops-write-max", "iops-size", "iops-total"]
            .map(|name| format!("throttling.{name}"));
        assert_eq!(names, options);
    }

    #[test]
    fn a_guest_keeps_its_identity() {
        const GUID: &str = "c773c261-d800-4348-9f5d-167fadd53cf8";
        let arguments = |device: &str| ["-device", device, "-smp", "2"].map(str::to_owned);
        for (auto, fixed) in [
            ("vmgenid,id=g,guid=auto", format!("vmgenid,id=g,guid={GUID}")),
            (r#"{"driver":"vmgenid","guid":"auto"}"#, format!(r#"{{"driver":"vmgenid","guid":"{GUID}"}}"#)),
        ] {
            let given = arguments(auto);
            let kept = with_identity(&definition(&given.each_ref().map(String::as_str)), GUID).unwrap();
            assert_eq!(kept.arguments, arguments(&fixed));
        }
        assert!(
            with_identity(&definition(&["-device", "vmgenid,guid=x", "-device", "y,guid=auto"]), GUID)
                .is_none()
        );
    }

    #[test]
    fn what_was_plugged_is_refused_by_name() {
        let now = Parts {
            devices: vec![device("new0", "virtio-net-pci")],
            modules: vec!["vCPU at socket 0 core 1".into()],
            ..Parts::default()
        };
        let told = revise(&definition(&[]), &Parts::default(), &now).unwrap_err();
        assert!(told[0].detail.contains("new0 (virtio-net-pci)"), "{told:?}");
        assert!(told[0].remedy.as_ref().unwrap().contains("device_del new0"));
        assert!(told[1].detail.contains("vCPU at socket 0 core 1"));
        let told = revise(
            &definition(&[]),
            &Parts { devices: vec![device("d0", "x")], ..Parts::default() },
            &Parts::default(),
        );
        assert!(told.unwrap_err()[0].detail.contains("d0 (x)"));
    }
}
