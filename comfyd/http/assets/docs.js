// Shows openapi.json in Swagger UI. Every address is relative to the page, so it also works below a proxy's prefix.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
follow();
dark.addEventListener("change", follow);

const address = new URL("openapi.json", document.baseURI).href;
let key = "";

// Where comfyd wants a key (API_KEYS), the document does too. It is asked for once, and forgotten with the page.
async function fetchDocument() {
  for (;;) {
    const answer = await fetch(address, { headers: key ? { "X-API-Key": key } : {} });
    if (answer.status !== 401) return answer.json();
    key = (window.prompt("This comfyd wants an API key:") || "").trim();
    if (!key) throw new Error("without a key there is nothing to show");
  }
}

fetchDocument().then(show, (error) => {
  document.getElementById("docs").textContent = error.message;
});

function show(spec) {
  window.ui = SwaggerUIBundle({
    spec,
    dom_id: "#docs",
    presets: [SwaggerUIBundle.presets.apis],
    layout: "BaseLayout",
    deepLinking: true,
    displayRequestDuration: true,
    docExpansion: "list",
    defaultModelsExpandDepth: 0, // the schemas' names, folded: there are many
    defaultModelExpandDepth: 2,
    showExtensions: false,
    validatorUrl: null, // nothing leaves for elsewhere
    requestInterceptor: (request) => {
      if (key && new URL(request.url, address).origin === location.origin) request.headers["X-API-Key"] = key;
      return request;
    },
  });
}
