//! The same machine in QEMU: a script for a shell.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use anyhow::Context;

use super::events::Interruption;
use super::kernel::{self, Payload};
use super::plan::{Boot, ConsoleSpec, DiskPlace, Machine};
use super::server;

/// What QEMU is given to start.
struct Start {
    kernel: String,
    initrd: Option<String>,
    cmdline: String,
}

/// The script: the servers of the disks that are files, QEMU, the end of the servers. A kernel on the first disk is copied to the
/// folder `extract`, or left to a boot loader. `no_kvm` says why KVM cannot be used.
pub fn script(machine: &Machine, extract: Option<&Path>, no_kvm: Option<&str>) -> anyhow::Result<String> {
    let start = start(machine, extract)?;
    let mut text = String::new();
    let mut servers = String::new();
    for (index, disk) in machine.disks.iter().enumerate() {
        if matches!(disk.place, DiskPlace::File { .. }) {
            let words = server::arguments(disk, machine.cpus, Path::new(&socket(index)));
            let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
            writeln!(text, "sapwood serve {} & server{index}=$!", words.join(" "))?;
            write!(servers, " $server{index}")?;
        }
    }
    if start.is_none() {
        text.push_str("# QEMU starts the boot loader of the first disk. --extract-kernel takes the kernel from the disk.\n");
    }
    if let Some(why) = no_kvm {
        writeln!(text, "# Without KVM here: {}", why.replace('\n', " "))?;
    }
    if let Some(timeout) = machine.timeout {
        write!(text, "timeout --foreground {} ", timeout.as_secs())?;
    }
    text.push_str("qemu-system-x86_64");
    for option in options(machine, start.as_ref(), no_kvm.is_none()) {
        let words: Vec<String> = option.iter().map(|word| quote(word)).collect();
        write!(text, " \\\n    {}", words.join(" "))?;
    }
    text.push('\n');
    if !servers.is_empty() {
        writeln!(text, "status=$?; kill{servers}; wait{servers}; (exit $status)")?;
    }
    Ok(text)
}

/// What to start without a boot loader, if that is known.
fn start(machine: &Machine, extract: Option<&Path>) -> anyhow::Result<Option<Start>> {
    let name = |path: &Path| path.display().to_string();
    match (&machine.boot, extract) {
        (Boot::Files { kernel, initrd, cmdline }, _) => Ok(Some(Start {
            kernel: name(kernel),
            initrd: initrd.as_deref().map(name),
            cmdline: cmdline.clone(),
        })),
        (Boot::FirstDisk { .. }, Some(folder)) => {
            let Payload { kernel, initrd, cmdline } = kernel::open(machine, Interruption::default())?;
            fs::create_dir_all(folder).with_context(|| name(folder))?;
            let save = |mut file: File, to: &str| {
                let to = folder.join(to);
                let copied = File::create(&to).and_then(|mut target| io::copy(&mut file, &mut target));
                copied.with_context(|| name(&to)).map(|_| name(&to))
            };
            let initrd = initrd.map(|initrd| save(initrd, "initrd")).transpose()?;
            Ok(Some(Start { kernel: save(kernel, "kernel")?, initrd, cmdline }))
        }
        (Boot::FirstDisk { .. }, None) => Ok(None),
    }
}

/// The socket of a server that the script starts, in the folder where it runs.
fn socket(index: usize) -> String {
    format!("sapwood-disk{index}.sock")
}

/// QEMU's options, each with its value.
fn options(machine: &Machine, start: Option<&Start>, kvm: bool) -> Vec<Vec<String>> {
    let mut options = Vec::new();
    let mut add = |words: &[&str]| options.push(words.iter().map(|&word| word.to_owned()).collect());
    let mib = machine.memory_bytes >> 20;
    add(&["-nodefaults", "-no-user-config", "-nographic"]);
    add(&["-machine", "q35,memory-backend=memory"]);
    // Shared, since the servers move data in it themselves.
    add(&["-object", &format!("memory-backend-memfd,id=memory,size={mib}M,share=on")]);
    add(&["-m", &format!("{mib}M"), "-smp", &machine.cpus.to_string(), "-cpu", "max"]);
    if kvm {
        add(&["-accel", "kvm"]);
    }
    add(&["-accel", "tcg"]);
    for (index, disk) in machine.disks.iter().enumerate() {
        let path = match &disk.place {
            DiskPlace::File { .. } => socket(index),
            DiskPlace::Socket(path) => path.display().to_string(),
        };
        // With reconnect= it also waits for a server that has just been started.
        add(&["-chardev", &format!("socket,id=disk{index},path={},reconnect=1", value(&path))]);
        let queues = disk.queues(machine.cpus);
        add(&["-device", &format!("vhost-user-blk-pci,chardev=disk{index},num-queues={queues}")]);
    }
    add(&["-device", "virtio-rng-pci", "-device", "pvpanic", "-action", "panic=exit-failure"]);
    match &machine.console {
        ConsoleSpec::Stdio => add(&["-serial", "mon:stdio"]),
        ConsoleSpec::None => add(&["-serial", "null"]),
        ConsoleSpec::File(path) => add(&["-serial", &format!("file:{}", value(&path.display().to_string()))]),
    }
    if machine.no_reboot {
        add(&["-no-reboot"]);
    }
    if let Some(Start { kernel, initrd, cmdline }) = start {
        add(&["-kernel", kernel]);
        if let Some(initrd) = initrd {
            add(&["-initrd", initrd]);
        }
        add(&["-append", cmdline]);
    }
    options
}

/// A value among QEMU's options, where commas separate.
fn value(text: &str) -> String {
    text.replace(',', ",,")
}

/// A word as a shell takes it.
fn quote(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_@%+=:,./-".contains(&byte);
    if !word.is_empty() && word.bytes().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_what_was_quoted() {
        for word in
            ["", "a", "a b", "it's", "$HOME", "`x`", "a\\b", "\"", "--x=1,2", "ü", "*", "a\nb", "~", "#"]
        {
            let line = format!("printf %s {}", quote(word));
            let output = std::process::Command::new("sh").args(["-c", &line]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), word, "{line}");
        }
        assert_eq!(quote("-device=a,b=c:d"), "-device=a,b=c:d");
    }
}
