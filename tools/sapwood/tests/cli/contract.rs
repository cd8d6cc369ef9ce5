//! What every command promises: help, bad arguments, missing, corrupt and untouched input.

use std::fs;

use crate::harness::Place;

/// A command that reads disks, and how it is called; `IN` is a disk of a format that is recognised.
const READERS: [&str; 6] =
    ["info IN", "map IN", "map --output=json IN", "check IN", "convert -O raw IN out.raw", "compare IN IN"];

/// Commands that open a disk for writing.
const WRITERS: [&str; 9] = [
    "resize IN 16M",
    "serve IN --socket socket",
    "convert -n -f raw -O layer disk.raw IN",
    "rebase -b disk.raw -F raw IN",
    "rebase -u -b disk.raw -F raw IN",
    "flatten IN",
    "commit IN",
    "compact IN",
    "boot --skip-probe IN",
];

const COMMANDS: [&str; 42] = [
    "create",
    "info",
    "map",
    "check",
    "convert",
    "compare",
    "resize",
    "rebase",
    "flatten",
    "commit",
    "compact",
    "serve",
    "boot",
    "store init",
    "store stat",
    "store set",
    "store seal",
    "store gc",
    "store check",
    "store scrub",
    "store account",
    "store backup",
    "daemon",
    "list",
    "tree",
    "show",
    "import",
    "export",
    "diff",
    "snapshot",
    "clone",
    "switch",
    "rollback",
    "rename",
    "delete",
    "protect",
    "unprotect",
    "describe",
    "label",
    "attach",
    "detach",
    "top",
];

/// Commands that do something without an argument, where a default store is named; here none is.
const WITHOUT_ARGUMENTS: [&str; 11] = [
    "store init",
    "store stat",
    "store seal",
    "store gc",
    "store check",
    "store scrub",
    "store account",
    "daemon",
    "list",
    "tree",
    "top",
];

/// The code for "could not", which for compare must not be the one for "different".
fn code_of_failure(command: &str) -> i32 {
    if command.starts_with("compare") { 2 } else { 1 }
}

fn place() -> Place {
    let place = Place::new();
    place.raw_disk("disk.raw");
    place.sapwood("convert -f raw -O layer disk.raw disk.layer").text();
    place
}

#[test]
fn every_command_has_help_with_an_example() {
    let place = Place::new();
    let all = place.sapwood("--help").text() + &place.sapwood("store --help").text();
    for command in COMMANDS {
        let last = command.split(' ').next_back().unwrap_or_default();
        assert!(all.contains(&format!("  {last} ")), "{command} is not listed");
        let help = place.sapwood(&format!("{command} --help")).text();
        assert!(help.contains(&format!("  sapwood {command} ")), "no example of {command}");
        assert!(!help.contains("--engine"), "hidden");
    }
    assert!(place.sapwood("--version").text().starts_with("sapwood "));
}

/// The section of docs/cli.md about a command.
fn section(command: &str) -> &'static str {
    let (_, rest) = include_str!("../../../../docs/cli.md")
        .split_once(&format!("\n## sapwood {command}\n"))
        .unwrap_or_else(|| panic!("docs/cli.md has nothing about {command}"));
    rest.split("\n## ").next().expect("a first piece")
}

#[test]
fn every_option_is_documented() {
    let place = Place::new();
    for command in COMMANDS {
        let help = place.sapwood(&format!("{command} --help")).text();
        let options = help.lines().filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().take(2).collect();
            words.into_iter().find(|word| word.starts_with("--"))
        });
        for option in options.filter(|option| !["--help", "--version"].contains(option)) {
            let text = section(command).replace(['[', ']', '='], "`").replace(' ', "`");
            assert!(text.contains(&format!("`{option}`")), "{command} {option}");
        }
    }
}

#[test]
fn every_field_is_documented() {
    let place = place();
    place.sapwood("create -b disk.layer over.layer").text();
    place.qemu_img("create -q -f qcow2 -b disk.raw -F raw over.qcow2").text();
    place.qemu_img("snapshot -c one over.qcow2").text();
    place.qemu_img("create -q -f qcow2 -o data_file=data aside.qcow2 1M").text();
    let disks = ["over.layer", "over.qcow2", "aside.qcow2"];
    for (command, disk) in ["info", "map", "check"].iter().flat_map(|c| disks.map(|disk| (*c, disk))) {
        let leave = if command == "map" { "--allow-backing" } else { "" };
        let answer = place.sapwood(&format!("{command} {leave} --output=json {disk}")).text();
        let fields = answer.split('"').collect::<Vec<_>>();
        for pair in fields.windows(2).filter(|pair| pair[1].starts_with(':')) {
            assert!(section(command).contains(&format!("`{}`", pair[0])), "{command} {disk}: {}", pair[0]);
        }
    }
}

#[test]
fn every_field_of_a_store_is_documented() {
    let place = place();
    place.sapwood("store init vms").text();
    for (command, rest) in [
        ("import", "-f raw disk.raw vms:web"),
        ("show", "vms:web"),
        ("show", "vms:web@imported"),
        ("tree", "vms"),
        ("list", "vms"),
        ("export", "vms:web@imported archive"),
        ("diff", "--all vms:web@imported"),
        ("store stat", "vms"),
        ("store seal", "vms"),
        ("store account", "vms"),
        ("store gc", "vms"),
        ("store check", "vms"),
        ("store scrub", "vms"),
        ("store backup", "--store vms copy"),
    ] {
        let answer = place.sapwood(&format!("{command} --output=json {rest}")).text();
        let text = match command {
            "tree" | "list" => format!("{}{}", section(command), section("show")),
            _ => section(command).to_owned(),
        };
        for pair in answer.split('"').collect::<Vec<_>>().windows(2).filter(|pair| pair[1].starts_with(':')) {
            assert!(text.contains(&format!("`{}`", pair[0])), "{command}: {}", pair[0]);
        }
    }
}

#[test]
fn every_command_refuses_bad_arguments() {
    let place = Place::new();
    for command in COMMANDS {
        match WITHOUT_ARGUMENTS.contains(&command) {
            true => place.sapwood(command).fails(1, &["which store?", "SAPWOOD_STORE"]),
            false => place.sapwood(command).fails(64, &["Usage"]),
        }
        place.sapwood(&format!("{command} --no-such-option x y")).fails(64, &["--no-such-option"]);
    }
    place.sapwood("").fails(64, &["Usage"]);
    place.sapwood("nonsense").fails(64, &["nonsense"]);
    place.sapwood("info -f vmdk x").fails(64, &["vmdk", "raw, layer and qcow2"]);
    place.sapwood("create x 10Q").fails(64, &["10Q", "10G"]);
    place.sapwood("serve x --socket s --queues 0").fails(64, &["0"]);
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0, "nothing was made");
}

#[test]
fn every_command_names_a_missing_input() {
    let place = place();
    for command in READERS.iter().chain(&WRITERS) {
        let line = command.replace("IN", "missing.layer");
        place.sapwood(&line).fails(code_of_failure(command), &["missing.layer", "No such file"]);
        place.sapwood(&line.replace("missing.layer", ".")).fails(code_of_failure(command), &["."]);
    }
    assert!(!place.exists("out.raw"));
}

#[test]
fn every_command_refuses_a_file_of_unknown_format() {
    let place = place();
    fs::write(place.path("text"), "not a disk").unwrap();
    fs::write(place.path("empty"), "").unwrap();
    fs::write(place.path("other.vmdk"), b"KDMV\x01\0\0\0").unwrap();
    // info describes what looks like nothing as raw, and a target's format is given, not guessed.
    let commands = READERS.iter().chain(&WRITERS[..2]).filter(|command| !command.starts_with("info"));
    for command in commands {
        let code = code_of_failure(command);
        place.sapwood(&command.replace("IN", "text")).fails(code, &["text", "-f raw"]);
        place.sapwood(&command.replace("IN", "empty")).fails(code, &["empty", "-f raw"]);
        place.sapwood(&command.replace("IN", "other.vmdk")).fails(code, &["vmdk", "convert"]);
    }
    place.sapwood("info other.vmdk").fails(1, &["vmdk"]);
    assert!(!place.exists("out.raw"));
}

#[test]
fn every_command_refuses_a_corrupt_layer() {
    let place = place();
    let whole = place.bytes("disk.layer");
    fs::write(place.path("short.layer"), &whole[..8]).unwrap();
    fs::write(place.path("cut.layer"), &whole[..4096]).unwrap();
    let mut flipped = whole;
    flipped[8..4096].iter_mut().for_each(|byte| *byte ^= 0xff);
    fs::write(place.path("flipped.layer"), flipped).unwrap();
    for disk in ["short.layer", "cut.layer", "flipped.layer"] {
        for command in READERS.iter().chain(&WRITERS).filter(|command| !command.starts_with("check")) {
            place.sapwood(&command.replace("IN", disk)).fails(code_of_failure(command), &[disk]);
        }
        let check = place.sapwood(&format!("check {disk}"));
        assert!(check.code == 1 || check.code == 2, "{disk}: {check:?}");
    }
    assert!(!place.exists("out.raw"));
    assert!(!place.exists("socket"));
}

#[test]
fn readers_change_nothing() {
    let place = place();
    for disk in ["disk.layer", "disk.raw"] {
        let before = place.bytes(disk);
        let times = fs::metadata(place.path(disk)).unwrap().modified().unwrap();
        for command in READERS {
            let (name, rest) = command.split_once(' ').unwrap();
            let rest = rest.replace("IN", disk);
            let formats = match (disk, name) {
                ("disk.raw", "compare") => "-f raw -F raw",
                ("disk.raw", _) => "-f raw",
                _ => "",
            };
            let answer = place.sapwood(&format!("{name} {formats} {rest}"));
            let expected = if (disk, name) == ("disk.raw", "check") { 63 } else { 0 };
            assert_eq!(answer.code, expected, "{command} {disk}: {answer:?}");
            let _ = fs::remove_file(place.path("out.raw"));
        }
        assert!(place.bytes(disk) == before, "{disk}");
        assert_eq!(fs::metadata(place.path(disk)).unwrap().modified().unwrap(), times, "{disk}");
    }
}

#[test]
fn quiet_commands_say_nothing() {
    let place = place();
    for line in [
        "create -q new.layer 1G",
        "check -q new.layer",
        "compare -q disk.layer disk.layer",
        "convert -q -O raw disk.layer out.raw",
        "resize -q new.layer 2G",
        "create -q -b new.layer over.layer",
        "rebase -q -b disk.layer over.layer",
        "rebase -q -u -b disk.layer over.layer",
        "commit -q over.layer",
        "flatten -q over.layer",
        "compact -q over.layer",
        "store init -q vms",
        "create -q vms:a 1M",
        "import -q -f raw disk.raw vms:web",
        "snapshot -q vms:a@s",
        "clone -q vms:a@s b",
        "switch -q vms:b a@s",
        "rollback -q vms:b",
        "resize -q vms:b 2M",
        "rename -q vms:b c",
        "protect vms:a",
        "unprotect vms:a",
        "describe vms:a text",
        "label vms:a key=value",
        "export -q vms:web@imported archive",
        "store seal -q vms",
        "store gc -q vms",
        "store check -q vms",
        "store scrub -q vms",
        "store account -q vms",
        "store backup -q --store vms copy",
        "store set -q --quota 1G vms",
        "delete -q --with-snapshots vms:web",
    ] {
        let answer = place.sapwood(line);
        assert_eq!((answer.code, answer.stdout.as_str(), answer.stderr.as_str()), (0, "", ""), "{line}");
    }
}

#[test]
fn both_engines_do_the_same() {
    let place = place();
    for engine in ["uring", "blocking"] {
        place.sapwood(&format!("--engine {engine} convert -O raw disk.layer {engine}.raw")).text();
        assert!(place.bytes(&format!("{engine}.raw")) == place.bytes("disk.raw"), "{engine}");
    }
}
