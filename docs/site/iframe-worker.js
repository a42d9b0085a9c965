// The search runs in a worker, and browsers start none for a page that is read from disk: it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class {
    constructor(url) {
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => setTimeout(() => this.onmessage?.(new MessageEvent("message", { data })));
      const script = inside.document.createElement("script");
      this.started = new Promise((resolve) => (script.onload = resolve));
      script.onerror = (event) => this.onerror?.(event);
      script.src = url;
      inside.document.body.appendChild(script);
    }
    postMessage(data) {
      this.started.then(() => this.frame.contentWindow?.onmessage(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
