//! `--device cuda:0` from outside, with a driver that runs kernels on the CPU and with none.

use crate::support::{hearth, stderr, tiny_model};
use hearth_cuda_stand_in::StandIn;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output, Stdio};

/// With this driver and compiler, and these settings of it.
fn with(driver: &StandIn, settings: &str, arguments: &[&str]) -> Command {
    let mut command = hearth(arguments);
    command.env("HEARTH_CUDA_DRIVER", driver.path()).env("HEARTH_NVRTC", driver.path());
    // No cache: compiled kernels belong to one stand-in, and where a file stands no folder is made.
    command.env("HEARTH_STAND_IN", settings).env("XDG_CACHE_HOME", "/dev/null");
    command
}

fn run(driver: &StandIn, settings: &str, arguments: &[&str]) -> Output {
    with(driver, settings, arguments).output().expect("the binary starts")
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

const PROMPT: [&str; 6] = ["--tokens", "5,9,3,17,5,9,3,21", "-n", "6", "--ignore-eos", "--json"];

#[test]
fn generate_and_logits_on_a_card_give_what_the_cpu_gives() {
    let (driver, model) = (StandIn::new(), tiny_model());
    let generate = |more: &[&str]| {
        let arguments = [&["generate", &model][..], &PROMPT, more].concat();
        json(&run(&driver, "", &arguments))["tokens"].clone()
    };
    let want = generate(&[]);
    assert_eq!(want.as_array().map(Vec::len), Some(6));
    assert_eq!(generate(&["--device", "cuda:0"]), want);
    assert_eq!(
        generate(&["--device", "cuda", "--memory", "device=2MiB,host=1MiB", "--speculative", "ngram"]),
        want
    );
    let logits = |more: &[&str]| {
        let arguments = [&["logits", &model, "--tokens", "1,2,3", "--json"][..], more].concat();
        let row = json(&run(&driver, "", &arguments))["logits"][0].clone();
        serde_json::from_value::<Vec<f32>>(row).expect("numbers")
    };
    let (want, got) = (logits(&[]), logits(&["--device", "cuda:0"]));
    assert!(want.len() == got.len() && want.iter().zip(&got).all(|(w, g)| (w - g).abs() < 1e-3));
}

#[test]
fn what_keeps_a_card_from_serving_is_one_sentence_and_an_exit_code() {
    let (driver, model) = (StandIn::new(), tiny_model());
    let cases: [(&str, &[&str], i32, &str); 8] = [
        ("count=0", &["--device", "cuda:0"], 2, "the NVIDIA driver finds no card"),
        (
            "major=7",
            &["--device", "cuda:0"],
            2,
            "stand-in has compute capability 7.0, 8.0 or newer is needed",
        ),
        ("", &["--device", "cuda:3"], 2, "there is no card cuda:3: the driver lists 1"),
        ("", &["--device", "gpu"], 2, "--device gpu is not known; write cpu, or cuda:0 for a card"),
        ("", &["--device", "cuda:0", "--draft", &model], 2, "--draft is for the CPU alone"),
        ("", &["--device", "cuda:0", "--adapter", "a=/tmp"], 2, "--adapter a=/tmp is for the CPU alone"),
        ("", &["--device", "cuda:0", "--memory", "50KiB"], 1, "device tier: needs "),
        ("launches=30", &["--device", "cuda:0", "--memory", "1GiB"], 1, "the card was lost at cu"),
    ];
    for (settings, more, code, sentence) in cases {
        let output = run(&driver, settings, &[&["generate", &model][..], &PROMPT, more].concat());
        let said = stderr(&output);
        assert!(output.status.code() == Some(code) && said.contains(sentence), "{more:?}: {output:?}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    let arguments = [&["generate", &model, "--device", "cuda:0"][..], &PROMPT].concat();
    let mut command = with(&driver, "", &arguments);
    let output =
        command.env("HEARTH_NVRTC", "/nonexistent/libnvrtc.so.12").output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("NVRTC, CUDA's run-time compiler, cannot be loaded"),
        "{}",
        stderr(&output)
    );
    let mut none = hearth(&[&["generate", &model, "--device", "cuda:0"][..], &PROMPT].concat());
    let output =
        none.env("HEARTH_CUDA_DRIVER", "/nonexistent/libcuda.so.1").output().expect("the binary starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("no NVIDIA driver: /nonexistent/libcuda.so.1 cannot be loaded"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn a_card_lost_while_generating_asks_for_another_try() {
    let (driver, model) = (StandIn::new(), tiny_model());
    let output =
        run(&driver, "launches=100", &[&["generate", &model, "--device", "cuda:0"][..], &PROMPT].concat());
    assert_eq!(output.status.code(), Some(75), "{}", stderr(&output));
    assert!(stderr(&output).contains("the engine failed: the card was lost at cu"), "{}", stderr(&output));
}

#[test]
fn a_server_whose_card_is_lost_fails_its_requests_and_ends() {
    let (driver, model) = (StandIn::new(), tiny_model());
    let arguments = ["serve", &model, "--device", "cuda:0", "--port", "0", "--name", "tiny"];
    let mut command = with(&driver, "launches=200", &arguments);
    let mut server =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut line = String::new();
    BufReader::new(server.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    let address = line.trim().rsplit("http://").next().expect("an address").to_owned();
    let body = r#"{"model":"tiny","prompt":[5,9,3,17],"max_tokens":200,"temperature":0,"ignore_eos":true}"#;
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n");
    let mut stream = TcpStream::connect(&address).expect("it listens");
    write!(stream, "{head}Connection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    assert!(answer.starts_with("HTTP/1.1 500") && answer.contains("the card was lost at cu"), "{answer}");
    let output = server.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(75), "{}", stderr(&output));
    assert!(stderr(&output).contains("the engine failed: the card was lost at cu"), "{}", stderr(&output));
}
