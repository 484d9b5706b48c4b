// Light or dark before the first paint: runs while the head is read. The choice is kept; "auto" follows the system.
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const apply = () => {
    const mode = localStorage.getItem('qwen-edit.theme') ?? 'auto';
    document.documentElement.dataset.theme = mode === 'auto' ? (dark.matches ? 'dark' : 'light') : mode;
  };
  apply();
  dark.addEventListener('change', apply);
  addEventListener('qwen-edit-theme', apply);
})();
