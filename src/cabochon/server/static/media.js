// How images, sounds and videos come in: picked, dropped, pasted, or recorded from the microphone.

// A file as a content part: images as image_url, sounds as input_audio, videos as video_url.
async function attachment(file) {
  const url = await new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.readAsDataURL(file);
  });
  const kind = file.type.split("/")[0];
  const part = kind === "audio"
    ? { type: "input_audio", input_audio: { data: url.slice(url.indexOf(",") + 1), format: file.name.split(".").pop() } }
    : { type: `${kind}_url`, [`${kind}_url`]: { url } };
  return { name: file.name, kind, url, part };
}

// Files from the picker, from drops anywhere on the page, and from pastes into the words.
export function watching({ input, words, zone, attach }) {
  const take = async (files) => { for (const file of [...files]) attach(await attachment(file)); };
  input.onchange = async () => {
    await take(input.files);
    input.value = "";
  };
  words.onpaste = (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    take(event.clipboardData.files);
  };
  zone.ondragover = (event) => {
    event.preventDefault();
    zone.classList.add("dropping");
  };
  zone.ondragleave = () => zone.classList.remove("dropping");
  zone.ondrop = (event) => {
    event.preventDefault();
    zone.classList.remove("dropping");
    take(event.dataTransfer.files);
  };
}

// A button that records until it is pressed again.
export function hearing({ button, attach, complain }) {
  let recorder = null;
  button.onclick = async () => {
    if (recorder) return recorder.stop();
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    } catch (error) {
      return complain(`The microphone can't be used: ${error.message}`);
    }
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = async () => {
      const type = recorder.mimeType.split(";")[0];
      recorder = null;
      button.setAttribute("aria-pressed", "false");
      for (const track of stream.getTracks()) track.stop();
      attach(await attachment(new File(pieces, `recording.${type.split("/")[1]}`, { type })));
    };
    recorder.start();
    button.setAttribute("aria-pressed", "true");
  };
}
