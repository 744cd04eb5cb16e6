//! The decoder of the replication stream against messages that no server sends: generated ones, those that a server once sent
//! (`tests/corpus/pgoutput`), and both with bytes changed, cut, repeated and joined. It never panics, decodes what is intact,
//! hands out no byte that it was not sent, and reserves no memory by a length that it was sent.
//!
//! `make fuzz SEEDS=N` runs N rounds (default 5,000), `WEFT_SEED=S` runs one again. A message that fails is printed; kept in the
//! corpus, it is tried first from then on.

use std::{env, fs, panic, path::Path};

use rand::{Rng, SeedableRng, rngs::StdRng};
use tokio::net::TcpListener;

use super::{
    pgoutput::{Message, Value},
    *,
};

const ROUNDS: u64 = 5_000;
/// Numbers that decoders get wrong.
const LENGTHS: [u32; 10] = [0, 1, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fff0, 0xffff_fffe, 0xffff_ffff];

/// What a message has to come out as.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Begin(u64),
    Commit(u64),
    Relation(u32, String, String, Vec<(String, u32)>),
    Insert(u32, Vec<Value>),
    Other,
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

fn corpus() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/pgoutput");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let messages: Vec<Vec<u8>> =
        files.iter().filter(|path| path.extension().is_none()).map(|path| fs::read(path).unwrap()).collect();
    assert!(messages.len() > 10, "the corpus is there");
    messages
}

fn text(random: &mut StdRng) -> String {
    let length = random.random_range(0..20);
    (0..length).map(|_| *b"aA_0\xc3\xa4 .".get(random.random_range(0..4)).unwrap() as char).collect()
}

/// A message as a server sends it.
fn message(random: &mut StdRng) -> (Vec<u8>, Expected) {
    let mut bytes = Vec::new();
    let expected = match random.random_range(0..6) {
        0 => {
            let lsn = random.random();
            bytes.put_u8(b'B');
            bytes.put_u64(lsn);
            bytes.put_i64(random.random());
            bytes.put_u32(random.random());
            Expected::Begin(lsn)
        }
        1 => {
            let end = random.random();
            bytes.put_slice(&[b'C', 0]);
            bytes.put_u64(random.random());
            bytes.put_u64(end);
            bytes.put_i64(random.random());
            Expected::Commit(end)
        }
        2 => {
            let (oid, schema, table) = (random.random(), text(random), text(random));
            bytes.put_u8(b'R');
            bytes.put_u32(oid);
            for name in [&schema, &table] {
                bytes.put_slice(name.as_bytes());
                bytes.put_u8(0);
            }
            bytes.put_u8(b'd');
            let columns: Vec<(String, u32)> =
                (0..random.random_range(0..12)).map(|_| (text(random), random.random())).collect();
            bytes.put_u16(u16::try_from(columns.len()).unwrap());
            for (name, type_oid) in &columns {
                bytes.put_u8(random.random_range(0..2));
                bytes.put_slice(name.as_bytes());
                bytes.put_u8(0);
                bytes.put_u32(*type_oid);
                bytes.put_i32(-1);
            }
            Expected::Relation(oid, schema, table, columns)
        }
        3 | 4 => {
            let oid = random.random();
            bytes.put_u8(b'I');
            bytes.put_u32(oid);
            bytes.put_u8(b'N');
            let values: Vec<Value> = (0..random.random_range(0..12)).map(|_| value(random)).collect();
            bytes.put_u16(u16::try_from(values.len()).unwrap());
            for value in &values {
                let (kind, content) = match value {
                    Value::Null => {
                        bytes.put_u8(*[b'n', b'u'].get(random.random_range(0..2)).unwrap());
                        continue;
                    }
                    Value::Text(content) => (b't', content),
                    Value::Binary(content) => (b'b', content),
                };
                bytes.put_u8(kind);
                bytes.put_u32(u32::try_from(content.len()).unwrap());
                bytes.put_slice(content);
            }
            Expected::Insert(oid, values)
        }
        _ => {
            bytes.put_u8(*b"OYTUDM".get(random.random_range(0..6)).unwrap());
            bytes.put_slice(text(random).as_bytes());
            Expected::Other
        }
    };
    (bytes, expected)
}

fn value(random: &mut StdRng) -> Value {
    let length = if random.random_ratio(1, 50) { 70_000 } else { random.random_range(0..40) };
    let mut content = vec![0; length];
    random.fill(&mut content[..]);
    let content = Bytes::from(content);
    match random.random_range(0..3) {
        0 => Value::Null,
        1 => Value::Text(content),
        _ => Value::Binary(content),
    }
}

fn mutate(random: &mut StdRng, bytes: &mut Vec<u8>, corpus: &[Vec<u8>]) {
    for _ in 0..random.random_range(1..4) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..6) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.random()),
            2 => {
                for (byte, new) in bytes.iter_mut().skip(at).zip(random.random::<[u8; 2]>()) {
                    *byte ^= new;
                }
            }
            3 => {
                let length = LENGTHS.get(random.random_range(0..LENGTHS.len())).unwrap().to_be_bytes();
                let skip = random.random_range(0..4);
                for (byte, new) in bytes.iter_mut().skip(at).zip(&length[skip..]) {
                    *byte = *new;
                }
            }
            4 => {
                let again = bytes.split_off(at);
                bytes.extend_from_slice(&again);
                bytes.extend_from_slice(&again);
                bytes.truncate(1 << 20);
            }
            _ => bytes.extend_from_slice(corpus.get(random.random_range(0..corpus.len())).unwrap()),
        }
    }
}

/// Decodes a message as a whole; checks that its values are bytes of it.
fn decode(bytes: &[u8]) -> Result<Expected, ReplicationError> {
    Ok(match Message::decode(Bytes::copy_from_slice(bytes))? {
        Message::Begin { commit_lsn, .. } => Expected::Begin(commit_lsn.0),
        Message::Commit { end_lsn } => Expected::Commit(end_lsn.0),
        Message::Relation(relation) => {
            assert!(relation.columns.len() <= bytes.len(), "a column has a name, a type, and more");
            let columns = relation.columns.into_iter().map(|column| (column.name, column.type_oid)).collect();
            Expected::Relation(relation.oid, relation.schema, relation.table, columns)
        }
        Message::Insert(insert) => {
            let values = insert.columns.collect::<Result<Vec<_>, _>>()?;
            let length = |value: &Value| match value {
                Value::Null => 1,
                Value::Text(content) | Value::Binary(content) => content.len() + 5,
            };
            assert!(values.iter().map(length).sum::<usize>() <= bytes.len(), "more than was sent");
            Expected::Insert(insert.relation, values)
        }
        Message::Other => Expected::Other,
    })
}

/// Runs a round; when it fails, prints with what.
fn try_round(what: &str, bytes: &[u8], round: impl FnOnce() + panic::UnwindSafe) {
    if let Err(error) = panic::catch_unwind(round) {
        println!("{what} fails with the message {bytes:02x?}");
        panic::resume_unwind(error);
    }
}

/// Address space of this process at its largest, in KiB.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn wild_messages_are_decoded_or_refused() {
    let (corpus, before) = (corpus(), peak());
    for kept in &corpus {
        try_round("the corpus", kept, || drop(decode(kept)));
        for length in 0..kept.len() {
            try_round("the corpus", kept, || drop(decode(&kept[..length])));
        }
    }
    let seeds = match number("WEFT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("WEFT_SEEDS").unwrap_or(ROUNDS),
    };
    for seed in seeds {
        let what = format!("WEFT_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let (mut bytes, expected) = message(&mut random);
        try_round(&what, &bytes, || assert_eq!(decode(&bytes).unwrap(), expected));
        if random.random() {
            bytes.clone_from(corpus.get(random.random_range(0..corpus.len())).unwrap());
        }
        mutate(&mut random, &mut bytes, &corpus);
        try_round(&what, &bytes, || drop(decode(&bytes)));
        try_round(&what, &bytes, || {
            if let Ok(Frame::Data(data)) = frame(Bytes::copy_from_slice(&bytes)) {
                assert_eq!(data.len() + 25, bytes.len());
            }
        });
    }
    assert!(peak() - before < 1 << 20, "memory is reserved by a length that was sent: {} KiB", peak() - before);
}

/// A server that sends these bytes in pieces of random length, and then closes; what comes out of the stream, and its end.
async fn streamed(random: &mut StdRng, bytes: &[u8]) -> (Vec<Frame>, ReplicationError) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let mut stream =
        WalStream { wire: Wire { stream: Box::new(stream), input: BytesMut::new(), output: BytesMut::new() } };
    let pieces: Vec<usize> = (0..bytes.len()).filter(|_| random.random_ratio(1, 50)).chain([bytes.len()]).collect();
    let sends = async move {
        let mut sent = 0;
        for end in pieces {
            server.write_all(&bytes[sent..end]).await.unwrap();
            tokio::task::yield_now().await;
            sent = end;
        }
    };
    let receives = async {
        let mut frames = Vec::new();
        loop {
            match stream.next().await {
                Ok(frame) => frames.push(frame),
                Err(error) => return (frames, error),
            }
        }
    };
    let both = async { tokio::join!(sends, receives).1 };
    timeout(Duration::from_secs(30), both).await.expect("it ends when the server closes")
}

fn copy_data(bytes: &mut Vec<u8>, body: &[u8]) {
    bytes.put_u8(b'd');
    bytes.put_u32(u32::try_from(body.len() + 4).unwrap());
    bytes.put_slice(body);
}

#[tokio::test]
async fn a_stream_in_pieces_gives_its_frames_and_a_wild_one_ends_in_an_error() {
    let (corpus, before) = (corpus(), peak());
    let rounds = number("WEFT_SEEDS").unwrap_or(ROUNDS) / 100;
    let seeds = number("WEFT_SEED").map_or(0..rounds, |seed| seed..seed + 1);
    for seed in seeds {
        println!("WEFT_SEED={seed}");
        let mut random = StdRng::seed_from_u64(seed);
        let mut bytes = Vec::new();
        let messages: Vec<Vec<u8>> = (0..10).map(|_| message(&mut random).0).collect();
        for message in &messages {
            copy_data(&mut bytes, &[&[b'w'][..], &[0; 24], message].concat());
            copy_data(&mut bytes, &[&[b'k'][..], &[0; 17]].concat());
        }
        let (frames, error) = streamed(&mut random, &bytes).await;
        assert!(matches!(error, ReplicationError::Closed), "{error:?}");
        let data = frames.iter().filter_map(|frame| if let Frame::Data(data) = frame { Some(data) } else { None });
        assert!(data.eq(&messages), "what was sent comes out");
        mutate(&mut random, &mut bytes, &corpus);
        streamed(&mut random, &bytes).await;
    }
    let (_, error) = streamed(&mut StdRng::seed_from_u64(0), b"d\xff\xff\xff\xffw").await;
    assert!(matches!(error, ReplicationError::Io(_)), "{error:?}");
    let (_, error) = streamed(&mut StdRng::seed_from_u64(0), b"d\x7f\xff\xff\xffw").await;
    assert!(matches!(error, ReplicationError::Protocol(_)), "{error:?}");
    let (_, error) = streamed(&mut StdRng::seed_from_u64(0), b"d\x3f\xff\xff\xffw").await;
    assert!(matches!(error, ReplicationError::Closed), "{error:?}");
    assert!(peak() - before < 1 << 19, "memory is reserved by a length that was sent: {} KiB", peak() - before);
}
